from megatransformer_jax.evaluation.diagnostics.measures import in_model_order


def test_layers_come_in_the_order_of_a_pass():
    wanted = [
        "embedding",
        "prelude/layer_0",
        "core/adapter",
        "core/layers/layer_2",
        "core/layers/layer_10",
        "coda/layer_0",
        "final_norm",
        "something",
    ]
    values = {name: number for number, name in enumerate(wanted)}
    assert list(in_model_order(dict(sorted(values.items()))).items()) == list(values.items())


def test_iterations_of_the_core_follow_each_other():
    wanted = [f"core/layer_{n}/iteration_{i}" for i in (1, 2, 10) for n in (0, 1)]
    assert list(in_model_order(dict.fromkeys(sorted(wanted)))) == wanted
