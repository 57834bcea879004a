"""Notes that the processes of a run leave for each other, in torchrun's store. Nobody waits for a note."""


class Noticeboard:
    """The notes of all ``processes`` (decoupled.parallel.processes.Processes). They are gone after a restart."""

    def __init__(self, processes):
        self.store = processes.store
        self.heartbeats = [f"heartbeat {rank}" for rank in range(processes.size)]
        self.own_heartbeat = self.heartbeats[processes.rank]

    def post(self, name, value=""):
        """Leaves a note with this ``name`` and ``value``."""
        self.store.set(name, str(value))

    def has(self, *names):
        """Whether there is a note with each of the ``names``."""
        return self.store.check(list(names))

    def read(self, name):
        """The value of the note with this ``name``, a string; None if there is no such note."""
        if not self.store.check([name]):
            return None
        return self.store.get(name).decode()

    def beat(self):
        """Shows the others that this process is alive. Returns the number of heartbeats of each process; an empty list
        until all processes have had one.
        """
        self.store.add(self.own_heartbeat, 1)
        if not self.store.check(self.heartbeats):
            return []
        return [int(count) for count in self.store.multi_get(self.heartbeats)]
