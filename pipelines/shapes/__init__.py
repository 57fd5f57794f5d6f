"""The shapes world: captioned pictures of simple shapes, and a judge that reads them back.

It serves the demo and the tests and is no part of the pipeline: no stage imports it. A recipe names the files that it
writes (a URL list, prompts) and the oracle, as it would name a user's own.
"""
