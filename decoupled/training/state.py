"""The state of a run: what its checkpoint saves and restores."""

import warnings

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from decoupled.errors import InputError, last_line
from decoupled.parallel.mesh import all_reduce_meters

SCHEDULE_HYPERPARAMETERS = (  # attributes of PyTorch's schedules that change as they step
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
    """The ``objects`` of a run: {name: an object with state_dict and load_state_dict, or a list of them, one for each
    module}. The loss scales of all optimizers, from ``scaler(optimizer)``, are added as "scalers".

    "net" is the network. "meters" count this replica's images only. With a ``stage`` (decoupled.parallel.stages.Stage),
    the lists and the network are the part that this process trains.
    """

    def __init__(self, objects, scaler, mesh, stage=None):
        self.mesh = mesh
        self.stage = stage
        self.per_module = {"scalers"}  # names of the lists with one object for each module
        self.objects = {}  # name → list of objects
        for name, value in objects.items():
            if isinstance(value, (list, tuple)):
                self.per_module.add(name)
                self.objects[name] = list(value)
            else:
                self.objects[name] = [value]
        optimizers = [value for value in self.all_objects() if isinstance(value, Optimizer)]
        # `scaler` numbers the modules in this order, from the lowest up.
        self.objects["scalers"] = [scaler(optimizer) for optimizer in optimizers]

    def all_objects(self):
        return [value for values in self.objects.values() for value in values]

    def get(self, name):
        """The list of objects called ``name``."""
        return self.objects.get(name, [])

    def has(self, value):
        """Whether ``value`` is one of the objects."""
        return any(value is mine for mine in self.all_objects())

    def begin_epoch(self):
        """Calls ``begin`` of all objects that have this method, such as images and meters."""
        for value in self.all_objects():
            if hasattr(value, "begin"):
                value.begin()

    def close(self):
        """Calls ``close`` of all objects that have this method."""
        for value in self.all_objects():
            if hasattr(value, "close"):
                value.close()

    # Saving and restoring

    def gather(self):
        """{name: [state_dict, …]} of the whole run, complete in process 0 only. All processes must call this after the
        same mini-batch.
        """
        objects = dict(self.objects)
        objects["meters"] = all_reduce_meters(self.get("meters"), self.mesh)
        state = {name: [value.state_dict() for value in values] for name, values in objects.items()}
        if self.stage is None:
            return state
        return self.merge(self.mesh.to_first(state))

    def merge(self, parts):
        """The state of the whole run from ``parts``, the states of all stages, lowest first."""
        whole = {}
        for part in parts:
            for name, states in part.items():
                if name in self.per_module:
                    whole[name] = whole.get(name, []) + states
                elif name == "net":
                    parameters_below = whole[name][0] if name in whole else {}
                    whole[name] = [parameters_below | states[0]]
                else:  # the same in every stage, such as the position in the images
                    whole.setdefault(name, states)
        return whole

    def restore(self, saved, path):
        """Restores all objects from ``saved``, which ``gather`` returned and which was read from the file ``path``.
        Raises InputError if it does not fit, for example after a change of the script.
        """
        try:
            for name, values in self.objects.items():
                states = saved[name]
                if self.stage is not None and name in self.per_module:
                    states = self.stage.own(states)
                for value, state in zip(values, states, strict=True):
                    if name == "schedules":
                        check_same_schedule(value.state_dict(), state, path)
                    load_quietly(value, state)
                    if isinstance(value, LambdaLR):
                        check_same_lambdas(value, path)
        except (KeyError, RuntimeError, ValueError) as error:
            raise InputError(
                f"{path} does not fit this version of the script ({type(error).__name__}: {last_line(error)}): resume "
                "with the code that wrote it, or start a new run"
            ) from error
        if self.mesh.replica_index > 0:
            for meter in self.get("meters"):
                meter.begin()  # the saved sums are over all replicas: only replica 0 continues from them


def load_quietly(value, state):
    """``value.load_state_dict(state)`` without a warning for parameters of other stages, which are on the meta
    device.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "for .*: copying from a non-meta parameter")
        value.load_state_dict(state)


def check_same_schedule(new, saved, path):
    """Raises InputError if the ``saved`` state of a schedule has other hyperparameters than the ``new`` schedule, as
    when --epochs has grown: loading the state would silently restore the old ones.
    """
    for name, value in new.items():
        before = saved.get(name, value)
        if name in SCHEDULE_HYPERPARAMETERS and value != before:
            raise other_schedule(path, f"{name} {before} (now {value})")
        if name == "_schedulers":  # of SequentialLR and ChainedScheduler
            for new_part, saved_part in zip(value, before, strict=True):
                check_same_schedule(new_part, saved_part, path)


def check_same_lambdas(schedule, path):
    """Raises InputError if the functions of ``schedule``, a restored LambdaLR, do not return the saved rates: functions
    are not saved, and other ones would silently change the rate.
    """
    rates = zip(schedule.lr_lambdas, schedule.base_lrs, schedule.get_last_lr(), strict=True)
    for function, base_lr, before in rates:
        value = base_lr * function(schedule.last_epoch)
        if value != before:
            raise other_schedule(path, f"the rate {before:g} (now {value:g}) in step {schedule.last_epoch}")


def other_schedule(path, difference):
    return InputError(
        f"{path} has a learning rate schedule with {difference}: resume with the same --epochs and script as "
        "before, or start a new run"
    )
