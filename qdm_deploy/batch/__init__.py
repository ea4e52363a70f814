"""Generating very many images: a pure function of a job and an index, committed shard by shard."""
