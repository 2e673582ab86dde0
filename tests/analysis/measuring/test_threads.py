"""Several threads: they measure different networks rightly, one network once, and leave the process
as it was.
"""

import copy
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event

import pytest
import torch
from pandas.testing import assert_frame_equal
from torch import nn

from analysis import measure
from analysis.measuring.measurement import evaluation, measuring, tf32_settings
from analysis.measuring.pairs import recording

PATIENCE = 60  # seconds, of a test that hangs


def network(seed=0, channels=4):
    torch.manual_seed(seed)
    return nn.Sequential(
        *(nn.Conv2d(3, channels, 3), nn.BatchNorm2d(channels), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3), nn.BatchNorm2d(channels)),
    )


def batches(seed=0):
    return torch.randn(4, 8, 3, 12, 12, generator=torch.Generator().manual_seed(seed))


def in_threads(*functions):
    """What each function returns, all of them run at once."""
    with ThreadPoolExecutor(len(functions)) as pool:
        return [
            future.result(PATIENCE) for future in [pool.submit(function) for function in functions]
        ]


def state_of_process():
    return [getattr(backend, name) for backend, name, _ in tf32_settings()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_two_networks_in_step(precision):
    """Batch by batch beside each other: the numbers of one after the other, gradients and autocast
    per thread.
    """
    networks = [network(1), network(2, channels=6)]
    expected = [measure(model, batches(i), precision=precision) for i, model in enumerate(networks)]
    barrier = Barrier(2, timeout=PATIENCE)

    def slowly(i):
        for batch in batches(i):
            barrier.wait()
            yield batch

    measured = in_threads(
        *(lambda i=i: measure(networks[i], slowly(i), precision=precision) for i in (0, 1))
    )
    for ours, theirs in zip(measured, expected, strict=True):
        assert_frame_equal(ours, theirs)
    assert all(module.training for model in networks for module in model.modules())


def test_one_network_in_two_threads_is_refused():
    model, inside, tried = network(), Event(), Event()

    def slowly():
        for batch in batches():
            inside.set()
            assert tried.wait(PATIENCE)
            yield batch

    def second():
        assert inside.wait(PATIENCE)
        try:
            with pytest.raises(ValueError, match="is being measured already"):
                measure(model, batches())
        finally:
            tried.set()

    frame, _ = in_threads(lambda: measure(model, slowly()), second)
    assert_frame_equal(frame, measure(model, batches()))  # and it can be measured again


@pytest.mark.parametrize(
    "other", [lambda model: model, lambda model: nn.Sequential(model[0], nn.BatchNorm2d(4))]
)
def test_two_measurements_of_one_convolution_are_refused(other):
    model = network()
    with measuring(model) as measurement:
        with pytest.raises(ValueError, match="is being measured already"), measuring(other(model)):
            pass
        for batch in batches():
            measurement.add(batch)
    assert_frame_equal(measurement.result().to_frame("network"), measure(model, batches()))


def test_a_copy_is_measured_beside_it():
    model = network()
    with measuring(model) as first, measuring(copy.deepcopy(model), kernel_size=(3, 3)) as second:
        for batch in batches():
            first.add(batch)
            second.add(batch)
    assert_frame_equal(first.result().to_frame("a"), second.result().to_frame("a"))


def test_a_forward_pass_of_another_thread_does_not_count():
    """While the network itself runs for the measurement, between its two layers, and before and
    after.
    """
    model, others = network(), batches(seed=5)
    expected = measure(model, batches())
    outputs = []

    def interrupted(self, x):
        in_threads(lambda: outputs.append(model[0](others[0])))
        x = self[2](self[1](self[0](x)))
        in_threads(lambda: outputs.append(model[4](model[3](model[1](model[0](others[0]))))))
        return self[4](self[3](x))

    frame = measure(model, batches(), forward=interrupted)
    assert_frame_equal(frame, expected, rtol=1e-6)
    assert len(outputs) == 2 * len(batches())
    assert outputs[0].requires_grad  # of that thread's own


def test_batches_are_added_where_the_block_began():
    """Elsewhere gradients would be recorded, and autocast would be off."""
    with measuring(network()) as measurement:
        measurement.add(batches()[0])
        with pytest.raises(ValueError, match="in another thread than the one that began"):
            in_threads(lambda: measurement.add(batches()[1]))
    assert measurement.images == 8


def test_the_process_is_as_it_was_after_measurements_that_overlap():
    """The first one to begin ends first: TF32 is off until the other one ends, and then as it was."""
    models, began, ended, during = (
        [network(1), network(2)],
        Barrier(2, timeout=PATIENCE),
        Event(),
        [],
    )
    before = state_of_process()

    def early():
        with evaluation(models[0]):
            began.wait()
        ended.set()

    def late():
        with evaluation(models[1]):
            began.wait()
            assert ended.wait(PATIENCE)
            during.extend(state_of_process())

    in_threads(early, late)
    assert during == [value for _, _, value in tf32_settings()]
    assert state_of_process() == before
    assert before != during


def test_a_compiled_network_is_seen_after_another_measurement_ends():
    """torch.compile is told for the whole process to run eagerly, until the last measurement ends."""
    compiled, events = torch.compile(network(1), backend="eager"), [Event(), Event(), Event()]
    with torch.no_grad():
        compiled.eval()(batches()[0])  # compiled without hooks

    def early():
        with recording(network(2)):
            events[0].set()
            assert events[1].wait(PATIENCE)
        events[2].set()

    def late():
        assert events[0].wait(PATIENCE)
        with measuring(compiled) as measurement:
            events[1].set()
            assert events[2].wait(PATIENCE)
            measurement.add(batches()[0])
        return measurement.result().to_frame("compiled")

    _, frame = in_threads(early, late)
    assert len(frame) == 2
