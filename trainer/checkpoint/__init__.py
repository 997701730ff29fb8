"""Checkpoints of logical state: complete or absent, checksummed, fenced by attempt.

RUN/checkpoints/step-00001000/
    .metadata, __0_0.distcp, ...   tensors, written by every rank (torch.distributed.checkpoint)
    state.json                     step, tokens, position in the data
    manifest.json                  sizes and SHA-256 of the files above, shapes of the tensors
RUN/checkpoints/latest             link that moves last
"""
