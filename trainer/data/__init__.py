"""From shards of documents to rows of tokens, in an order that depends on the configuration only.

1. listing       finds a corpus's shards: globs, manifests, stores.
2. stores, sources, cache, gzips, index, pieces
                 give a shard's bytes and its text from any place on, whatever the store does; damage tells of
                 what is lost.
3. shards        cuts text into documents and these into blocks; passes lets parts of a shard share the work.
4. tokenizer, engines
                 turn text into ids; special tokens written in a document stay text. tokenized and
                 tokenized_writer do it ahead of training; decontaminate leaves out what is held out.
5. lanes         one lane of one corpus: its blocks shuffled, packed into rows; texts and tokenized feed it.
6. order         which corpus and lane the i-th row of the run comes from, and which rank computes it.
7. loader        threads of a rank that prepare its rows of the next global batches.

census counts a corpus, in full or from a sample.
"""
