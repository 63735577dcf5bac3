"""Signals, the watchdog and errors of other processes, tested without a run."""

import os
import signal
import time

import pytest
import torch
from accelerate import Accelerator

from training_reftr.guards import Signals, Stopped, Watchdog, explain_runtime_error


@pytest.fixture
def accelerator():
    return Accelerator(cpu=True)


def send(number: int):
    signal.raise_signal(number)


def send_without_effect(number: int):
    """Send a signal that must not end the process, and fail if it does: pytest itself would end."""
    try:
        send(number)
    except Stopped as error:
        pytest.fail(str(error))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_defers_first_signal_only_during_training(accelerator, number, capfd):
    with Signals() as signals:
        with signals.deferred():
            assert signals.poll(accelerator) == (False, False)
            send_without_effect(number)
            assert signals.poll(accelerator) == (False, True)
            assert signals.stop == number
        assert f"{number.name}: saving after this step" in capfd.readouterr().err
    with Signals() as signals:
        with signals.deferred():
            pass
        with pytest.raises(Stopped) as raised:
            send(number)
    assert raised.value.exit_code == 128 + number
    assert str(raised.value) == f"{number.name}: ended at once, nothing more was saved."
    assert str(Stopped(number, is_saved=True)) == f"{number.name}: the run is saved."


def test_signals_raises_on_second_interrupt_not_second_sigterm(accelerator):
    with Signals() as signals, signals.deferred(is_announced=False):
        send_without_effect(signal.SIGTERM)
        send_without_effect(signal.SIGTERM)
        assert signals.poll(accelerator) == (False, True)
        with pytest.raises(Stopped) as raised:
            send(signal.SIGINT)
    assert raised.value.number == signal.SIGINT
    with Signals() as signals, signals.deferred(is_announced=False):
        send(signal.SIGINT)
        with pytest.raises(Stopped) as raised:
            send(signal.SIGTERM)
    assert raised.value.number == signal.SIGINT


def test_signals_requests_one_checkpoint_per_sigusr1(accelerator, capfd):
    with Signals() as signals, signals.deferred():
        send(signal.SIGUSR1)
        assert signals.poll(accelerator) == (True, False)
        assert signals.poll(accelerator) == (False, False)
    assert capfd.readouterr().err == ""


def test_signals_restores_previous_handlers():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = [signal.getsignal(number) for number in numbers]
    with Signals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_signals_in_forked_process_ignores_interrupt_not_sigterm():
    with Signals():
        child = os.fork()
        if child == 0:
            send(signal.SIGINT)
            send(signal.SIGTERM)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_watchdog_ends_process_that_stops_feeding(capfd):
    def exit_code(feed: bool) -> int:
        child = os.fork()
        if child == 0:
            with Watchdog(1 / 60) as watchdog:
                for _ in range(5):
                    time.sleep(0.3)
                    if feed:
                        watchdog.feed()
            time.sleep(1.2)  # the watchdog is off
            os._exit(7)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    assert exit_code(feed=True) == 7
    assert capfd.readouterr().err == ""
    assert exit_code(feed=False) == 1
    assert "Timeout" in capfd.readouterr().err


def test_explain_names_errors_of_other_processes():
    killed = explain_runtime_error(RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. \nmore"))
    assert isinstance(killed, ChildProcessError)
    assert "(pid 7) was killed by signal: Killed; most often memory is full" in str(killed)
    lost = explain_runtime_error(RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer\nmore"))
    assert isinstance(lost, ConnectionError)
    assert "Connection closed by peer" in str(lost)
    assert "more" not in str(lost)
    assert isinstance(explain_runtime_error(torch.distributed.DistBackendError("reset")), ConnectionError)
    assert explain_runtime_error(RuntimeError("CUDA out of memory")) is None
