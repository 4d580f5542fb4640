"""Elements copied to the device where they are used."""

import numpy as np
import pytest
import torch

from functrain.core.errors import ArgumentError
from functrain.data import Source, arrays, prefetch
from functrain.data.laws import check_prefetch, same
from functrain.data.transfer import Transfer, checked_device

DATA = {"x": torch.randn(12, 5), "y": (torch.arange(12), np.arange(12.0))}
BATCHES = arrays(DATA).shuffle(0).batch(4)


def test_a_device_is_checked_when_it_is_named():
    assert checked_device("cpu") == checked_device(torch.device("cpu")) == torch.device("cpu")
    for wrong in (None, 1.5, ["cpu"], True):
        with pytest.raises(ArgumentError, match="device takes a torch"):
            checked_device(wrong)
    for missing in ("abacus", "cuda:4096", ""):
        with pytest.raises(ArgumentError, match=f"device='{missing}' cannot be used here: "):
            checked_device(missing)


@pytest.mark.parametrize("workers", [1, 3])
def test_on_the_cpu_nothing_changes(workers):
    check_prefetch(BATCHES, depth=3, workers=workers, device="cpu")


def test_elements_arrive_on_their_device():
    with prefetch(BATCHES, 2, device="meta", memory="1 KiB") as batches:
        for element, expected in zip(batches, BATCHES, strict=True):
            assert element["x"].device == element["y"][0].device == torch.device("meta")
            assert element["y"][1].shape == expected["y"][1].shape


def test_leaves_that_are_no_tensors_stay_as_they_are():
    item = {"x": torch.ones(2), "name": "text", "array": np.zeros(3), "none": None}
    with prefetch([item], device="meta") as stream:
        (moved,) = stream
    assert moved["x"].is_meta
    assert moved["name"] == "text"
    assert moved["array"] is item["array"]


def test_a_copy_that_fails_is_an_error_at_its_element():
    class Unmovable(Source):
        length = 3

        def get(self, i, epoch):
            return torch.zeros(2, device="meta") if i == 1 else torch.zeros(2)

    with prefetch(Unmovable(), device="cpu") as batches:
        stream = iter(batches)
        next(stream)
        with pytest.raises(NotImplementedError, match="meta"):
            next(stream)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
class TestOnAGPU:
    def test_elements_are_the_same(self):
        with prefetch(BATCHES, 3, workers=2, device="cuda") as batches:
            assert batches.device == torch.device("cuda", torch.cuda.current_device())
            for element, expected in zip(batches, BATCHES, strict=True):
                assert element["x"].device == batches.device
                assert same({name: element[name] for name in ("x",)}, {"x": expected["x"].to(batches.device)})

    def test_work_on_an_element_begins_when_its_copy_is_done(self):
        # Copies of 64 MiB are under way when they are taken; sums taken at once, on a stream of the consumer's own, are right.
        whole = torch.ones(6, 1 << 24)
        whole *= torch.arange(1, 7)[:, None]
        with prefetch(arrays(whole), 3, device="cuda") as batches, torch.cuda.stream(torch.cuda.Stream()):
            sums = [batch.double().sum() for batch in batches]
            assert [float(total) for total in sums] == [float(n << 24) for n in range(1, 7)]

    def test_memory_is_not_given_to_others_while_work_on_it_is_under_way(self):
        # A long product is queued before each read of a batch that Python has let go of by then.
        busy = torch.randn(4096, 4096, device="cuda")
        whole = torch.arange(40.0)[:, None].repeat(1, 1 << 20)
        means = []
        with prefetch(arrays(whole), 4, workers=2, device="cuda") as batches:
            for batch in batches:
                for _ in range(4):
                    torch.mm(busy, busy)
                means.append(batch.mean())
                del batch
        assert [float(mean) for mean in means] == [float(n) for n in range(40)]

    def test_what_lies_on_the_device_already_is_waited_for(self):
        transfer = Transfer(checked_device("cuda"))
        made = torch.randn(4096, 4096, device="cuda") @ torch.ones(4096, 4096, device="cuda")
        moved = transfer.receive(*transfer.send(made))
        assert torch.equal(moved, made)
