"""The replay buffer's rule, written as it is stated: what the fast one is compared with."""


class NaiveBuffer:
    """Holds anything, newest last, with its uses: a list of [item, uses]."""

    def __init__(self, capacity, max_reuse=None, sampling="priority_lifo"):
        self.capacity, self.max_reuse, self.sampling = capacity, max_reuse, sampling
        self.slots = []

    def write(self, item):
        self.slots = [*self.slots, [item, 0]][-self.capacity :]

    def read(self):
        """(item, how often it had been read before), or None."""
        readable = [slot for slot in self.slots if self.max_reuse is None or slot[1] < self.max_reuse]
        if not readable:
            return None
        least = [slot for slot in readable if slot[1] == min(uses for _, uses in readable)]
        slot = least[-1 if self.sampling == "priority_lifo" else 0]
        slot[1] += 1
        return slot[0], slot[1] - 1
