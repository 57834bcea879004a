"""Notes that the processes of a run leave for each other, in torchrun's store. Nobody waits for a note."""


class Noticeboard:
    """The notes of all ``processes`` (decoupled.parallel.processes.Processes). After a restart there are none."""

    def __init__(self, processes):
        self.store = processes.store
        self.heartbeat_names = [f"heartbeat {rank}" for rank in range(processes.size)]
        self.own_heartbeat_name = self.heartbeat_names[processes.rank]

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
        """Shows the others that this process is alive."""
        self.store.add(self.own_heartbeat_name, 1)

    def heartbeat_counts(self):
        """How often each process has called ``beat``; an empty list until every process has."""
        if not self.store.check(self.heartbeat_names):
            return []
        return [int(count) for count in self.store.multi_get(self.heartbeat_names)]
