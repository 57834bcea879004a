"""The replay buffer's rule against a naive model of it, its compression, and the memory it says it takes."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from naive_buffer import NaiveBuffer
from running import load_script

load_script("async_buffer/cifar_buffer.py")  # its folder can be imported from now on
from replay_buffer import (  # noqa: E402
    HandOver,
    PlainStorage,
    QuantizedStorage,
    ReplayBuffer,
    check_memory,
    free_memory,
    make_buffers,
)

from decoupled import InputError  # noqa: E402

RULES = {
    "capacity": st.integers(1, 9),
    "max_reuse": st.none() | st.integers(1, 3),
    "sampling": st.sampled_from(("priority_lifo", "fifo")),
    "moves": st.lists(st.sampled_from("wwwwrrrrrrc"), max_size=60),  # write, read, checkpoint
}


@settings(max_examples=500, deadline=None)
@given(**RULES)
def test_reads_what_the_rule_says(capacity, max_reuse, sampling, moves):
    def empty():
        return ReplayBuffer(capacity, 1, (1, 1, 1), max_reuse=max_reuse, sampling=sampling)

    buffer, model = empty(), NaiveBuffer(capacity, max_reuse, sampling)
    for number, move in enumerate(moves):
        if move == "w":
            buffer.write(torch.full((1, 1, 1, 1), float(number)), torch.tensor([number]), step=number)
            model.write(number)
        elif move == "r":
            sample, expected = buffer.read(), model.read()
            assert (sample is None) == (expected is None)
            if sample is not None:
                assert (sample.representation.item(), sample.labels.item(), sample.step, sample.uses) == (
                    *[expected[0]] * 3,
                    expected[1],
                )
        else:
            state, buffer = copy.deepcopy(buffer.state_dict()), empty()
            buffer.load_state_dict(state)
        assert len(state_of(buffer)) == len(model.slots) <= capacity
        assert state_of(buffer) == sorted((number, uses) for number, uses in model.slots)


def state_of(buffer):
    """(what it holds, uses) of every slot that is not empty."""
    return sorted((buffer.labels[slot.index].item(), slot.uses) for slot in buffer.filled)


def test_the_rule_by_hand():
    buffer = ReplayBuffer(3, 1, (1, 1, 1))
    write = lambda number: buffer.write(torch.full((1, 1, 1, 1), float(number)), torch.tensor([number]))  # noqa: E731
    read = lambda: buffer.read().labels.item()  # noqa: E731
    assert buffer.read() is None
    write(1)
    write(2)
    assert [read() for _ in range(5)] == [2, 1, 2, 1, 2]  # newest first, least used first
    write(3)
    assert [read() for _ in range(4)] == [3, 3, 3, 1]  # 3 has fewest uses, twice; then as many as 1, but is newer
    write(4)  # in the place of 1
    assert read() == 4


def test_the_newest_is_found_across_the_write_pointer():
    """Slots 0..2 hold 3, 4, 2 after five writes: of equally used ones the next is 4, not the highest slot's 2, and the
    last is 2, not slot 0's 3.
    """
    buffer = ReplayBuffer(3, 1, (1, 1, 1))
    for number in range(5):
        buffer.write(torch.zeros(1, 1, 1, 1), torch.tensor([number]))
    assert buffer.labels.flatten().tolist() == [3, 4, 2]
    assert [buffer.read().labels.item() for _ in range(3)] == [4, 3, 2]


def test_one_slot_is_a_mailbox_and_hand_over_gives_each_once():
    mailbox, hand_over = ReplayBuffer(1, 2, (1, 1, 1)), HandOver("cpu")
    for number in (1.0, 2.0):
        for buffer in (mailbox, hand_over):
            buffer.write(torch.full((2, 1, 1, 1), number), torch.zeros(2, dtype=torch.int64), step=7)
    assert [mailbox.read().representation[0].item() for _ in range(3)] == [2, 2, 2] and mailbox.slots[0].uses == 3
    assert hand_over.read()[2:] == (0, 7) and hand_over.read() is None


def test_storage_is_allocated_once_and_read_without_a_copy():
    buffer = ReplayBuffer(2, 4, (3, 5, 7))
    places = {name: tensor.data_ptr() for name, tensor in buffer.tensors().items()}
    values = torch.randn(4, 3, 5, 7).to(memory_format=torch.channels_last)
    for _ in range(5):
        buffer.write(values, torch.arange(4))
    sample = buffer.read()
    assert torch.equal(sample.representation, values) and torch.equal(sample.labels, torch.arange(4))
    assert sample.representation.is_contiguous(memory_format=torch.channels_last)
    assert sample.representation.data_ptr() == places["values"]  # slot 0: of five writes the last
    assert places == {name: tensor.data_ptr() for name, tensor in buffer.tensors().items()}


def test_a_checkpoint_holds_what_is_filled_and_comes_back_exactly():
    torch.manual_seed(1)
    for bits in (None, 8, 4):
        buffer = ReplayBuffer(4, 2, (3, 3, 3), bits=bits, dtype=torch.bfloat16)
        for _ in range(3):
            buffer.write(torch.randn(2, 3, 3, 3), torch.randint(10, (2,)))
        assert all(
            tensor.untyped_storage().nbytes() == tensor.nbytes and len(tensor) == 3
            for tensor in buffer.state_dict()["tensors"].values()
        )
        buffer.write(torch.randn(2, 3, 3, 3), torch.randint(10, (2,)))
        other = ReplayBuffer(4, 2, (3, 3, 3), bits=bits, dtype=torch.bfloat16)
        other.load_state_dict(copy.deepcopy(buffer.state_dict()))
        for _ in range(6):
            mine, its = other.read(), buffer.read()
            assert (
                torch.equal(mine.representation, its.representation) and mine[1].equal(its[1]) and mine[2:] == its[2:]
            )


SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3))


@settings(max_examples=200, deadline=None)
@given(
    bits=st.sampled_from((8, 4)),
    shape=SHAPES,
    seed=st.integers(0, 10**6),
    scale=st.sampled_from((0.0, 1e-30, 1.0, 1e6)),
)
def test_compression_is_off_by_at_most_half_a_step(bits, shape, seed, scale):
    values = scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)).relu()
    batch, *rest = shape
    slots = QuantizedStorage(2, batch, rest, dtype=torch.float32, device="cpu", pinned=False, bits=bits)
    slots.write(1, values)
    restored = slots.read(1, torch.device("cpu"))
    least, most = values.amin((0, 2, 3), keepdim=True), values.amax((0, 2, 3), keepdim=True)
    step = (most - least) / (2**bits - 1)
    assert restored.shape == values.shape and restored.is_contiguous(memory_format=torch.channels_last)
    assert ((restored - values).abs() <= 0.5 * step + 1e-5 * most).all()
    assert torch.equal(restored[(values == least)], values[(values == least)])
    assert slots.values.shape == (2, -(-values.numel() * bits // 8))


@pytest.mark.parametrize("bits", [None, 8, 4])
def test_the_memory_stated_is_the_memory_taken(bits):
    shapes = [(8, 16, 16), (16, 8, 8)]
    buffers, lines = make_buffers(5, 32, shapes, storage_device=torch.device("cpu"), dtype=torch.float32, bits=bits)
    kind = QuantizedStorage if bits else PlainStorage
    assert [type(buffer.storage) for buffer in buffers] == [kind, kind]
    values = 5 * 32 * (8 * 16 * 16 + 16 * 8 * 8)
    ranges = 5 * (8 + 16) * 2 * 4 if bits else 0
    total = values * (bits or 32) // 8 + ranges + 2 * 5 * 32 * 8
    assert sum(buffer.nbytes for buffer in buffers) == total
    assert sum(t.untyped_storage().nbytes() for buffer in buffers for t in buffer.tensors().values()) == total
    assert lines[0].startswith(
        f"buffer before module 1: 5 mini-batches x 32 x 8x16x16 in {f'{bits} bits' if bits else 'float32'}: "
    )
    assert lines[-1].startswith(f"buffers: {total / 1e6:.2f} MB on cpu") and (
        "less than in float32" in lines[-1]
    ) == bool(bits)


def test_memory_that_is_not_there_is_an_error_before_anything_is_allocated():
    settings = {"storage_device": torch.device("cpu"), "dtype": torch.float32}
    with pytest.raises(InputError, match="--buffer"):
        make_buffers(10**8, 128, [(1, 32, 32)], **settings)
    check_memory(0, torch.device("cpu"))
    free = free_memory(torch.device("cpu"))
    if free is not None:
        check_memory(free // 4, torch.device("cpu"))
        with pytest.raises(InputError, match="--compress"):
            check_memory(free, torch.device("cpu"))  # twice as much is needed, for a checkpoint


def test_free_memory_of_this_machine():
    free = free_memory(torch.device("cpu"))
    assert free is None or 0 < free < 2**50
