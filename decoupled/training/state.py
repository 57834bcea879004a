"""What of a run survives in its checkpoint."""

import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from decoupled.errors import InputError
from decoupled.parallel.mesh import all_reduce_meters

SCHEDULE_HYPERPARAMETERS = (  # of PyTorch's schedules: what they keep while they step
    "base_lrs",
    "T_0",
    "T_max",
    "gamma",
    "milestones",
    "_milestones",
    "step_size",
    "total_iters",
    "total_size",
    "total_steps",
)


class State:
    """The ``objects`` of a run, {name: object with state_dict and load_state_dict, or a list of them}, and a loss
    scale, ``scaler(optimizer)``, for each optimizer among them.

    Lists have one object for each module. "net" is the network; "meters" count on every replica of ``mesh``. With a
    ``stage`` (decoupled.parallel.stages.Stage), the lists and the network are this process's part of the whole.
    """

    def __init__(self, objects, scaler, mesh, stage=None):
        self.mesh = mesh
        self.stage = stage
        self.lists = {"scalers"}  # names of what has one object for each module
        self.objects = {}  # name → list of objects
        for name, value in objects.items():
            if isinstance(value, (list, tuple)):
                self.lists.add(name)
                self.objects[name] = list(value)
            else:
                self.objects[name] = [value]
        optimizers = [value for value in self.all_objects() if isinstance(value, Optimizer)]
        self.objects["scalers"] = [scaler(optimizer) for optimizer in optimizers]

    def all_objects(self):
        return [value for values in self.objects.values() for value in values]

    def get(self, name):
        """The objects called ``name``, a list."""
        return self.objects.get(name, [])

    def has(self, value):
        """Whether ``value`` is one of the objects."""
        return any(value is mine for mine in self.all_objects())

    def begin_epoch(self):
        """Calls ``begin`` of all objects that have it: images and meters."""
        for value in self.all_objects():
            if hasattr(value, "begin"):
                value.begin()

    def close(self):
        """Calls ``close`` of all objects that have it."""
        for value in self.all_objects():
            if hasattr(value, "close"):
                value.close()

    # What a checkpoint has

    def gather(self):
        """{name: [state_dict, …]} of the whole run in process 0. All processes call this after the same mini-batch."""
        objects = dict(self.objects)
        objects["meters"] = all_reduce_meters(self.get("meters"), self.mesh)
        state = {name: [value.state_dict() for value in values] for name, values in objects.items()}
        if self.stage is None:
            return state
        return self.join(self.mesh.to_first(state))

    def join(self, parts):
        """The state of the whole run from those of all stages, lowest first."""
        whole = {}
        for part in parts:
            for name, states in part.items():
                if name in self.lists:
                    whole[name] = whole.get(name, []) + states
                elif name == "net":
                    parameters_below = whole[name][0] if name in whole else {}
                    whole[name] = [parameters_below | states[0]]
                else:  # what every stage has, such as the place in the images: the lowest stage's
                    whole.setdefault(name, states)
        return whole

    def restore(self, saved, path):
        """Brings all objects back to what ``gather`` gave, ``saved``. Raises InputError, naming its file ``path``,
        where that is another network's.
        """
        try:
            for name, values in self.objects.items():
                states = saved[name]
                if self.stage is not None and name in self.lists:
                    states = self.stage.own(states)
                for value, state in zip(values, states, strict=True):
                    if name == "schedules":
                        check_same_schedule(value.state_dict(), state, path)
                    load_quietly(value, state)
                    if isinstance(value, LambdaLR):
                        check_same_lambdas(value, path)
        except (KeyError, RuntimeError, ValueError) as error:
            reason = str(error).strip().split("\n")[-1].strip()
            raise InputError(
                f"{path} is a checkpoint of another network ({reason}): name one of this network"
            ) from error
        if self.mesh.replica > 0:
            for meter in self.get("meters"):
                meter.begin()  # replica 0 has the sums over all replicas


def load_quietly(value, state):
    """``value.load_state_dict(state)`` without a warning for the parameters that other stages have."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        value.load_state_dict(state)


def check_same_schedule(new, saved, path):
    """Raises InputError where the state ``saved`` of a schedule has other hyperparameters than its ``new`` one, as when
    --epochs has grown: loading it would silently bring the old ones back.
    """
    for name, value in new.items():
        before = saved.get(name, value)
        if name in SCHEDULE_HYPERPARAMETERS and value != before:
            raise other_schedule(path, f"{name} {before} (now {value})")
        if name == "_schedulers":  # of SequentialLR and ChainedScheduler
            for new_part, saved_part in zip(value, before, strict=True):
                check_same_schedule(new_part, saved_part, path)


def check_same_lambdas(schedule, path):
    """Raises InputError where the functions of ``schedule``, a LambdaLR that was restored, do not give the rates that
    it had: functions are not saved, and new ones would silently continue with other rates.
    """
    rates = zip(schedule.lr_lambdas, schedule.base_lrs, schedule.get_last_lr(), strict=True)
    for function, base_lr, last_lr in rates:
        now = base_lr * function(schedule.last_epoch)
        if now != last_lr:
            raise other_schedule(path, f"the rate {last_lr:g} (now {now:g}) in step {schedule.last_epoch}")


def other_schedule(path, difference):
    return InputError(
        f"{path} is of a run whose learning rate schedule has {difference}: resume with the --epochs that it had, or "
        "start a new run"
    )
