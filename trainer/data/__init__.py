"""From shards of documents to rows of tokens, in an order that depends on the configuration only.

1. shards    lists a corpus's files and reads documents one by one; damage tells of those it cannot.
2. tokenizer turns text into ids; special tokens written in a document stay text.
3. lanes     one lane of one corpus: its documents shuffled by blocks, packed into rows.
4. order     which corpus and lane the i-th row of the run comes from, and which rank computes it.
5. loader    a thread per rank that prepares the rank's rows of the next global batches.
"""
