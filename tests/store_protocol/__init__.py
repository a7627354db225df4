"""The store's protocol as a state machine small enough to try every interleaving. The argument: docs/store-protocol.md

Each part of the argument is a switch in `Protocol`; the tests turn them off one by one and see which promise breaks.

state.py         steps and safeguards, actors, and what Redis and object storage hold
publisher.py     the publisher's steps
collector.py       the collector's steps
surroundings.py  readers, taggers, the loss of Redis and its rebuilding, time
explorer.py      every interleaving, and the promises in each state
"""
