"""Calls become flat tensors and flat results become what the model returned."""

import json
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import nn

from fxcompress.capture import capture
from fxcompress.errors import ArtifactError, InputError
from fxcompress.interface import InputLeaf, Interface, TailShapeError


class Nested(nn.Module):
    """Takes tensors by position, keyword and inside containers; returns everything that may be returned."""

    def forward(self, image, batch, *, scale=1.0, mode="plain"):
        y = image * scale + batch["mask"][:, None]
        pair = (y.relu(), y)
        return {"pair": pair, "same": y, "none": None, "number": 3, "list": [batch["parts"][0]], "input": image}


def example(n=1):
    return (torch.randn(n, 3, 4), {"mask": torch.ones(n, 4), "parts": [torch.zeros(n, 2), torch.ones(n, 2)]})


@pytest.fixture(scope="module")
def captured():
    return capture(Nested().eval(), example(), {"scale": 2.0})


def call(captured, *args, **kwargs):
    return captured.interface.unflatten(captured.graph_module(*captured.interface.flatten(args, kwargs)))


@pytest.mark.parametrize("batch", [0, 1, 2, 7])
def test_round_trip_at_any_batch(captured, batch):
    args = example(batch)
    expected, actual = Nested()(*args, scale=2.0), call(captured, *args, scale=2.0)
    torch.testing.assert_close(actual, expected)
    assert type(actual["pair"]) is tuple and type(actual["list"]) is list
    assert actual["none"] is None and actual["number"] == 3
    assert actual["same"] is actual["pair"][1]


def test_positional_and_keyword_arguments_mix(captured):
    image, batch = example(3)
    expected = Nested()(image, batch, scale=2.0)["same"]
    for args, kwargs in (((image, batch), {}), ((image,), {"batch": batch}), ((), {"batch": batch, "image": image})):
        assert torch.equal(call(captured, *args, **kwargs, scale=2.0)["same"], expected)
    reordered = {"parts": batch["parts"], "mask": batch["mask"]}
    assert torch.equal(call(captured, image, reordered, scale=2.0)["same"], expected)


def test_names_and_shapes(captured):
    leaves = captured.interface.tensor_inputs
    assert [leaf.name for leaf in leaves] == ["image", "batch['mask']", "batch['parts'][0]", "batch['parts'][1]"]
    assert [leaf.tail for leaf in leaves] == [(3, 4), (4,), (2,), (2,)]
    assert leaves[0].shape_text == "(batch, 3, 4)"


def changed(**changes):
    """The arguments of a good call with some of them replaced."""
    image, batch = example(2)
    call = {"image": image, **batch, **changes}
    return (call["image"], {k: call[k] for k in call if k not in ("image", "scale")}), {"scale": call.get("scale", 2.0)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": torch.zeros(2, 3)}, r"argument image has 2 dimensions; expected shape \(batch, 3, 4\)"),
        ({"image": torch.zeros(3, 3, 4)}, r"argument batch\['mask'\] has batch 2; expected batch 3 as image has"),
        ({"image": torch.zeros(2, 3, 4, dtype=torch.int32)}, "argument image has dtype int32; expected float32"),
        ({"image": torch.zeros(2, 3, 4, dtype=torch.complex64)}, "argument image has dtype complex64"),
        ({"image": [1, 2]}, r"argument image is missing; expected the arguments of the example call: image, batch"),
        ({"image": None}, r"argument image is NoneType; expected a tensor of shape \(batch, 3, 4\)"),
        ({"image": torch.zeros(2, 3, 4).to_sparse()}, "has layout torch.sparse_coo"),
        ({"image": torch.zeros(2, 3, 4, device="meta")}, "argument image is on meta"),
        ({"extra": torch.zeros(2)}, r"argument batch\['extra'\] is not an argument of the example call"),
        ({"scale": 3.0}, "argument scale is 3.0; expected 2.0, the value the model was captured with"),
        ({"scale": 2}, "argument scale is 2; expected 2.0"),
        ({"scale": torch.tensor(2.0)}, "argument scale is a Tensor"),
    ],
)
def test_wrong_calls(captured, changes, message):
    args, kwargs = changed(**changes)
    with pytest.raises(InputError, match=message) as error:
        captured.interface.flatten(args, kwargs)
    assert not isinstance(error.value, TailShapeError)


def test_passed_twice(captured):
    image, batch = example()
    with pytest.raises(InputError, match="argument image is passed twice"):
        captured.interface.flatten((image, batch), {"image": image})


def test_another_spatial_size_is_told_apart(captured):
    args, kwargs = changed(image=torch.zeros(2, 3, 5), mask=torch.zeros(2, 5))
    with pytest.raises(TailShapeError, match=r"argument image has shape \(2, 3, 5\); expected shape \(batch, 3, 4\)"):
        captured.interface.flatten(args, kwargs)
    args, kwargs = changed(image=torch.zeros(2, 5))
    with pytest.raises(InputError) as error:
        captured.interface.flatten(args, kwargs)
    assert not isinstance(error.value, TailShapeError)


def linear(dtype=torch.float32):
    return capture(nn.Linear(3, 4).eval(), (torch.randn(2, 3, dtype=dtype),)).interface


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float32])
def test_floats_become_float32(dtype):
    x = torch.randn(5, 3).to(dtype)
    (flat,) = linear().flatten((x,))
    assert flat.dtype == torch.float32
    assert torch.equal(flat, x.float())


def test_codes_pass_for_a_float_input():
    x = torch.zeros(5, 3, dtype=torch.uint8)
    assert linear().flatten((x,))[0] is not None
    assert linear().flatten((x,))[0].dtype == torch.uint8


def test_any_memory_layout_is_accepted():
    interface = capture(nn.Conv2d(3, 4, 1).eval(), (torch.randn(2, 3, 4, 4),)).interface
    x = torch.randn(2, 4, 4, 3).permute(0, 3, 1, 2)
    for y in (x, x.contiguous(memory_format=torch.channels_last), torch.randn(2, 3, 8, 4)[:, :, ::2]):
        assert torch.equal(interface.flatten((y,))[0], y)


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(10, 3)

    def forward(self, ids):
        return self.table(ids)


def test_integer_inputs_widen_and_never_narrow():
    interface = capture(Lookup().eval(), (torch.zeros(2, 5, dtype=torch.int32),)).interface
    assert interface.flatten((torch.ones(3, 5, dtype=torch.uint8),))[0].dtype == torch.int32
    for wrong in (torch.int64, torch.float32):
        with pytest.raises(InputError, match="expected int32"):
            interface.flatten((torch.ones(3, 5, dtype=wrong),))


def test_gradients_do_not_enter():
    x = torch.randn(2, 3, requires_grad=True)
    assert not linear().flatten((x,))[0].requires_grad


def test_shared_arguments_have_no_batch():
    class Scaled(nn.Module):
        def forward(self, x, weight):
            return x * weight

    interface = capture(Scaled().eval(), (torch.randn(4, 3), torch.randn(3))).interface
    assert [leaf.batched for leaf in interface.tensor_inputs] == [True, False]
    interface.flatten((torch.randn(9, 3), torch.randn(3)))
    with pytest.raises(TailShapeError, match=r"weight has shape \(4,\); expected shape \(3\)"):
        interface.flatten((torch.randn(9, 3), torch.randn(4)))


# ------------------------------------------------------------------------------------------------------------- as data


Point = namedtuple("Point", ["x", "y"])


class Returns(nn.Module):
    def __init__(self, make):
        super().__init__()
        self.make = make

    def forward(self, x):
        return self.make(x)


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x + 1,
        lambda x: (x + 1,),
        lambda x: [x + 1, (x * 2, None, "text", 2.5, True)],
        lambda x: {"a": x + 1, "b": {"c": x}},
        lambda x: OrderedDict(z=x + 1, a=x * 2),
        lambda x: Point(x + 1, {"y": x}),
        lambda x: {0: x, 1: x + 1},
    ],
)
def test_saved_interfaces_return_the_same(make):
    x = torch.randn(2, 3)
    captured = capture(Returns(make).eval(), (x,))
    loaded = Interface.from_dict(json.loads(json.dumps(captured.interface.to_dict())))
    outputs = captured.graph_module(*loaded.flatten((x,)))
    expected, actual = make(x), loaded.unflatten(outputs)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (expected, actual)), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else (a == b and type(a) is type(b))
    if isinstance(expected, Point):
        assert actual._fields == Point._fields
    else:
        assert type(actual) is (dict if isinstance(expected, dict) else type(expected))
    assert loaded.inputs == captured.interface.inputs


def test_inputs_survive_saving(captured):
    loaded = Interface.from_dict(json.loads(json.dumps(captured.interface.to_dict())))
    assert (loaded.parameters, loaded.inputs, loaded.outputs) == (
        captured.interface.parameters, captured.interface.inputs, captured.interface.outputs,
    )  # fmt: skip


def test_other_containers_are_not_saved():
    class Odd:
        def __init__(self, x):
            self.x = x

    torch.utils._pytree.register_pytree_node(
        Odd, lambda o: ([o.x], None), lambda xs, _: Odd(*xs), flatten_with_keys_fn=lambda o: ([(("x",), o.x)], None)
    )
    interface = capture(Returns(lambda x: Odd(x + 1)).eval(), (torch.randn(2, 3),)).interface
    assert isinstance(interface.unflatten((torch.zeros(1),)), Odd)
    with pytest.raises(ArtifactError, match="the model returns a Odd; expected tuples, lists, dicts"):
        interface.to_dict()


def broken(**changes):
    return {**linear().to_dict(), **changes}


@pytest.mark.parametrize(
    "data",
    [
        {}, broken(inputs=[{}]), broken(inputs=None), broken(outputs=[0, 1]), broken(structure=["set", 0]),
        broken(structure=[]), broken(structure=["namedtuple", "a b", ["x", 0]]), broken(structure=["dict", [0]]),
        broken(inputs=[{"name": "x", "tail": [3], "dtype": "load", "batched": True, "value": None}]),
        broken(inputs=[{"name": "x", "tail": "3x", "dtype": "float32", "batched": True, "value": None}]),
        broken(outputs=[7]),
    ],
)  # fmt: skip
def test_malformed_records(data):
    with pytest.raises(ArtifactError, match="interface record is malformed"):
        Interface.from_dict(data)


def test_leaf_text():
    assert InputLeaf("x", (), "float32", True).shape_text == "(batch)"
    assert not InputLeaf("flag", value=True).is_tensor
