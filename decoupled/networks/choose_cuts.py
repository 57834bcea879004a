"""Chooses where to cut a model, and explains why a model cannot be cut as requested. ``class_name`` is the model's."""

import difflib
from typing import NamedTuple

from decoupled.errors import InputError
from decoupled.networks.graph import listing

TOLERANCE = 1.1  # prefer cuts between larger parts of the model if the largest module grows by no more than this
GUIDE = "docs/own_networks.md explains what to do"
READS_INPUT_AGAIN = (
    "wrap the model in a module that reads its input once. For sequences without padding on the right: "
    "return model.score(model.base_model(tokens).last_hidden_state)[:, -1]"
)


def choose_balanced(class_name, traced, splits):
    """The splits − 1 Places after which decouple cuts. Raises InputError if there are too few."""
    places = list(traced.places.values())
    if splits > 1 and not places:
        raise InputError(f"{class_name} cannot be cut: {explain_no_places(traced)}. {GUIDE}")
    # Two places with the same number of parameters below have nothing to learn in between: only one can be a cut
    distinct = {place.parameters: place.name for place in places}
    most = 1 + len(distinct)
    if splits > most:
        where = listing(distinct.values())
        known = f"{class_name} splits into {most} modules at most, cut after {where}"
        raise InputError(f"{known}{explain_whole(traced)}. {GUIDE}")
    best = partition(traced, places, splits)
    for depth in sorted({place.name.count(".") for place in places}):
        coarse = partition(traced, [place for place in places if place.name.count(".") <= depth], splits)
        if coarse and is_nearly_as_good(coarse, best):
            return coarse.places
    return best.places


class Partition(NamedTuple):
    """A division into modules, and the cuts that make it."""

    flops: tuple  # of the modules, descending
    places: tuple

    def add(self, start, end):
        """This Partition with one more module, between two Places, the second of which becomes the end."""
        flops = sorted((*self.flops, end.flops - start.flops), reverse=True)
        return Partition(tuple(flops), (*self.places, end))


def is_nearly_as_good(coarse, best):
    """Whether the largest module is at most TOLERANCE times that of ``best``, and no module is without FLOPs unless
    ``best`` has one, too.
    """
    has_empty = coarse.flops[-1] == 0 and best.flops[-1] > 0
    return coarse.flops[0] <= TOLERANCE * best.flops[0] and not has_empty


def partition(traced, places, splits):
    """The Partition into ``splits`` modules, each with a parameter to learn, whose largest module has the fewest FLOPs;
    ties go to the next largest, then to the latest cuts. None if there is no such Partition.
    """
    order = {place: index for index, place in enumerate(places)}

    def rank(option):
        return option.flops, [-order.get(place, len(places)) for place in option.places]

    # best[end]: the best Partition of the model below that Place. Adding the same module to two Partitions does not
    # change which of them is better, so dynamic programming finds the best.
    best = {traced.start: Partition((), ())}
    for part in range(1, splits + 1):
        ends = [traced.end] if part == splits else places
        reached = {}
        for end in ends:
            options = []
            for start, below in best.items():
                if start.parameters < end.parameters:
                    options.append(below.add(start, end))
            if options:
                reached[end] = min(options, key=rank)
        best = reached
    if traced.end not in best:
        return None
    found = best[traced.end]
    return Partition(found.flops, found.places[:-1])


def find_named(class_name, traced, names):
    """The Places called ``names``, in order. Raises InputError for a name that is not a place."""
    chosen = set()
    for name in names:
        node = traced.eval.named.get(name)
        place = traced.places.get(traced.eval.names[node][0]) if node else None
        if place is None:
            raise InputError(explain_no_cut(class_name, traced, name))
        chosen.add(place)
    places = [place for place in traced.places.values() if place in chosen]
    low = traced.start
    for place in places:
        if place.parameters == low.parameters:
            raise InputError(
                f"there is no parameter to learn between {low.name} and {place.name}: leave out one of them"
            )
        low = place
    return places


def explain_no_places(traced, most=3):
    """What prevents a cut after each of the outermost modules."""
    forward = traced.eval
    named = []
    for node in forward.nodes:
        name = forward.names[node][0]
        if node in forward.dependent and node is not forward.input and not name.endswith("()"):
            named.append((name.count("."), name))
    outermost = min((depth for depth, _ in named), default=0)
    obstacles = []
    reasons = []
    for depth, name in named:
        obstacle = traced.obstacle(name)
        if depth == outermost and obstacle:
            obstacles.append(obstacle)
            reasons.append(f"after {name}, {obstacle.text}")
    if not obstacles:
        return "it is a single layer" + explain_whole(traced)
    if obstacles[0].reads_input and not traced.example.is_floating_point():
        return f"{reasons[0]}; {READS_INPUT_AGAIN}"
    return "; ".join(reasons[:most]) + explain_whole(traced)


def explain_shared(traced, low, high):
    """Which parameters prevent a cut between two Places, if parameters are the reason."""
    forward = traced.eval
    start = forward.position[forward.named[low.name]]
    end = forward.position[forward.named[high.name]]
    for node in forward.nodes[start + 1 : end]:
        name = forward.names[node][0]
        obstacle = traced.obstacle(name) if node in forward.crossing else None
        if obstacle and obstacle.shared:
            return f": after {name}, {obstacle.text}"
    return ""


def explain_whole(traced):
    """The first module that tracing could not open, and why; "" if there is none."""
    whole = traced.eval.trace.whole
    if not whole:
        return ""
    path, error = next(iter(whole.items()))
    return f"; {path} stays whole: it {traced.export_error or error}"


def explain_no_cut(class_name, traced, name):
    """Why there is no cut called ``name``, and which cuts are nearest."""
    every = list(traced.places)
    forward = traced.eval
    node = forward.named.get(name)
    if node is None:
        inside = [path for path in forward.trace.whole if name.startswith(path + ".")]
        if inside:
            return f"{class_name} cannot be cut after {name}: {inside[0]} {forward.trace.whole[inside[0]]}"
        near = difflib.get_close_matches(name, every, n=4) or every
        return f"{class_name} calls no part named {name}: it can be cut after {listing(near)}"
    position = forward.position[node]
    below = [other for other in every if forward.position[forward.named[other]] < position]
    above = [other for other in every if forward.position[forward.named[other]] > position]
    nearest = below[-1:] + above[:2]
    obstacle = traced.obstacle(forward.names[node][0])
    reason = obstacle.text if obstacle else "it is only a view of the place before it"
    explanation = f"{class_name} cannot be cut after {name} ({reason})"
    if not nearest:
        return f"{explanation}. {GUIDE}"
    return f"{explanation}: the nearest places are {listing(nearest)}"
