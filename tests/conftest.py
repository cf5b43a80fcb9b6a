import os

# Several test processes share two cores: more threads each are many times slower.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption(
        "--vectors",
        metavar="DIR",
        help="run the reference tests over DIR/<system>/golden-*.json in addition to the repository's own",
    )
