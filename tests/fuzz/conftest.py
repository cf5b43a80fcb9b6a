from hypothesis import settings


def pytest_configure(config):
    count = config.getoption("--fuzz-examples")
    # the same cases on every machine; a case may load a whole model, so that none has a deadline
    settings.register_profile("zoo", derandomize=True, deadline=None, max_examples=count)
    settings.load_profile("zoo")
