"""The channels behind edges: queue, register, credits. State machines on one event loop.

They know keys (group ids) and opaque bodies, no stages and no transport: the flow calls them, whichever runtime it
serves. Fairness: waiting senders and receivers are served first come, first served; what waits in a queue, oldest
group first. Cancelling a wait loses nothing: an item or credit already handed to the cancelled waiter goes back.
Closing wakes every waiter.
"""
