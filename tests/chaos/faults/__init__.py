"""Seeded faults at the seams between the services, and an observer that trusts none of them.

link.py        a TCP proxy: cut, delay, drop, truncate and flip bytes on the way to Redis and to gRPC servers
storage.py     object storage that refuses, forgets, repeats, is late or damages what it returns
servers.py     the real rollout and teacher servers, with a place where messages can be tampered with
tampering.py   what is done to those messages
damage.py      what is done to the store behind everybody's back
catalogue.py   the one table of all kinds of faults
observer.py    what was published, decoded and trained on, each known first-hand; judges every step
world.py       everything one run needs, on real servers
episode.py     the loop: one run, faults before each of its steps
fault.py       one fault
tally.py       what many episodes came to
"""
