import fuzz_helpers
from hypothesis import settings


def pytest_configure(config):
    count = config.getoption("--fuzz-examples")
    # the same cases on every machine; a case may load a whole model, so that none has a deadline
    settings.register_profile("zoo", derandomize=True, deadline=None, max_examples=count)
    settings.load_profile("zoo")


def pytest_terminal_summary(terminalreporter):
    if tried := fuzz_helpers.tried:
        terminalreporter.section("fuzzing")
        for test, count in sorted(tried.items()):
            terminalreporter.write_line(f"{count:8,}  {test}")
        terminalreporter.write_line(f"{sum(tried.values()):8,}  cases tried")
