"""Sources over arrays: every dtype, every layout in memory."""

import numpy as np
import pytest
import torch

from functrain.core.errors import TreeError
from functrain.data import arrays

NAMES = "bool uint8 uint16 uint32 uint64 int8 int16 int32 int64 float16 bfloat16 float32 float64 complex64 complex128"


@pytest.mark.parametrize("name", NAMES.split())
def test_tensors_of_every_dtype_keep_it(name):
    tensor = torch.arange(12).reshape(4, 3).to(getattr(torch, name))
    source = arrays(tensor)
    assert source(2).dtype == tensor.dtype
    assert torch.equal(source(2), tensor[2])
    assert torch.equal(source.batch(4)(0), tensor)
    assert torch.equal(
        source.shuffle(0).batch(4)(0).sort(0).values if name != "bool" and "complex" not in name else tensor,
        tensor,
    )


@pytest.mark.parametrize("dtype", ["?", ">f4", "<f4", ">i8", "u2", "f2", ">c16"])
@pytest.mark.parametrize("make", [np.array, lambda a: a[::-1], np.asfortranarray, lambda a: a.T.copy().T])
def test_arrays_of_every_layout_read_right(dtype, make):
    array = make(np.arange(12).reshape(4, 3).astype(dtype))
    array.setflags(write=False)
    source = arrays({"a": array})
    for i in range(4):
        assert source(i)["a"].tolist() == array[i].tolist()
    assert source.batch(3)(0)["a"].tolist() == array[:3].tolist()
    taken = source.take(np.array([3, 0, 3]), 0)["a"]
    assert taken.tolist() == array[[3, 0, 3]].tolist()


def test_what_is_handed_out_is_not_the_array():
    array = np.zeros((4, 2))
    source = arrays(array)
    for element in (source(1), source.batch(4)(0), source.take(np.array([0, 2]), 0)):
        element.fill_(7)
    assert not array.any()


def test_parameters_give_no_gradient():
    source = arrays(torch.ones(3, requires_grad=True))
    assert not source(0).requires_grad
    assert not source.batch(2)(0).requires_grad


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no leaves"),
        (torch.zeros(0, 3), "no elements"),
        ({"x": torch.zeros(3), "y": torch.zeros(4)}, r"x: \(3,\), y: \(4,\)"),
        (torch.tensor(1.0), "same first dimension"),
        ({"x": torch.eye(3).to_sparse()}, "leaf 'x' is Tensor of torch.sparse_coo"),
        ({"x": [1, 2]}, "leaf 'x.0' is int"),
        ({"x": np.array(["a"])}, "leaf 'x' is ndarray of <U1"),
        ({"x": np.array([object()])}, "ndarray of object"),
    ],
)
def test_what_cannot_be_a_source_says_why(data, message):
    with pytest.raises(TreeError, match=message):
        arrays(data)
