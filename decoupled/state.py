"""What of a run must survive, in one form whatever the processes: that of the run in one process."""

import warnings

from torch.optim import Optimizer

from decoupled import InputError
from decoupled.metrics import added


class State:
    """The ``objects`` of a run, {name: object with state_dict, or a list of them}, with a loss scale, ``scaler(it)``,
    for each optimizer among them.

    Lists have one object for each module; "net" is the network; "meters" count on every replica of ``mesh``. With
    ``stage``, a decoupled.stages.Stage of several, this process has its part of the lists and the network.
    """

    def __init__(self, objects, scaler, mesh, stage=None):
        self.mesh, self.stage = mesh, stage
        self.listed = {"scalers", *(key for key, value in objects.items() if isinstance(value, (list, tuple)))}
        self.objects = {key: list(value) if key in self.listed else [value] for key, value in objects.items()}
        optimizers = [value for value in self if isinstance(value, Optimizer)]
        self.objects["scalers"] = [scaler(optimizer) for optimizer in optimizers]

    def __iter__(self):
        return (value for values in self.objects.values() for value in values)

    def __getitem__(self, key):
        return self.objects[key]

    def __contains__(self, key):
        return key in self.objects

    def each(self, method):
        """Calls ``method`` of all objects that have it."""
        for value in self:
            getattr(value, method, lambda: None)()

    def gather(self):
        """{name: [state_dict, …]} of the whole run in process 0. All processes call this after the same mini-batch."""
        objects = self.objects | {"meters": added(self.objects.get("meters", []), self.mesh)}
        state = {key: [value.state_dict() for value in values] for key, values in objects.items()}
        return state if self.stage is None else self.join(self.mesh.to_first(state))

    def join(self, parts):
        """One state of those of all stages: lists one after the other, the network's parts together, and of what each
        has, as of the images, the lowest's.
        """
        whole = {}
        for part in parts:
            for key, values in part.items():
                if key in self.listed:
                    whole[key] = whole.get(key, []) + values
                elif key == "net":
                    whole[key] = [whole.get(key, [{}])[0] | values[0]]
                else:
                    whole.setdefault(key, values)
        return whole

    def restore(self, saved, path):
        """Brings all objects back to what ``gather`` gave. Raises InputError, naming its file ``path``, where that is
        of other modules.
        """
        try:
            for key, values in self.objects.items():
                states = saved[key]
                if self.stage is not None and key in self.listed:
                    states = self.stage.own(states)
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")  # another stage's
                    for value, state in zip(values, states, strict=True):
                        value.load_state_dict(state)
        except (InputError, MemoryError):
            raise
        except Exception as error:  # whatever a state that is another object's leads to
            reason = str(error).strip().split("\n")[-1].strip()
            what = f"{path} is a checkpoint of another network ({reason})"
            raise InputError(f"{what}: name one of this network's") from error
        for meter in self.objects.get("meters", ()) if self.mesh.replica else ():
            meter.begin()  # replica 0 has the sum over all
