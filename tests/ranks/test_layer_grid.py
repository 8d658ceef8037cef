"""Layer names as tables."""

from fim_lora.ranks.layer_grid import format_grid, layer_grids


def names(*values):
    return dict.fromkeys(values, 1)


def test_one_stack():
    (grid,) = layer_grids(
        names("model.layers.10.mlp.up_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.mlp.up_proj")
    )
    assert (grid.stack, grid.depths, grid.kinds) == ("model.layers", [2, 10], ["up_proj", "q_proj"])
    assert grid.cells[2, "q_proj"] == "model.layers.2.self_attn.q_proj"
    assert (10, "q_proj") not in grid.cells


def test_labels_are_the_shortest_ends_that_differ():
    (grid,) = layer_grids(names("h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.attn.c_attn"))
    assert grid.kinds == ["attn.c_proj", "mlp.c_proj", "c_attn"]


def test_stacks_and_layers_without_depth():
    grids = layer_grids(
        names("encoder.block.0.layer.0.q", "decoder.block.0.layer.1.q", "lm_head", "encoder.block.1.layer.0.q")
    )
    assert [(grid.stack, grid.depths) for grid in grids] == [
        ("encoder.block", [0, 1]),
        ("decoder.block", [0]),
        ("", [None]),
    ]


def test_a_label_is_never_the_end_of_another():
    (grid,) = layer_grids(names("h.0.proj", "h.0.block.proj"))
    assert sorted(grid.kinds) == ["block.proj", "proj"]
    assert len(grid.cells) == 2


def test_every_layer_is_in_one_cell():
    many = names(*(f"m.{depth}.{kind}.{index}" for depth in range(3) for kind in "ab" for index in range(4)))
    cells = [name for grid in layer_grids(many) for name in grid.cells.values()]
    assert sorted(cells) == sorted(many)


def test_text():
    text = format_grid({"m.0.q": 3, "m.0.v": 12, "m.1.q": 8})
    assert text == "m\n   q   v\n0  3  12\n1  8    "


def test_layers_without_depth_keep_their_name():
    (grid,) = layer_grids(names("bert.pooler.dense", "classifier"))
    assert (grid.stack, grid.depths, grid.kinds) == ("", [None], ["bert.pooler.dense", "classifier"])
