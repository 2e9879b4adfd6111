import tomesd_plus


def test_star_import_gives_exactly_the_public_names():
    names = {}
    exec("from tomesd_plus import *", names)
    assert set(names) - {"__builtins__"} == set(tomesd_plus.__all__)
    assert all(hasattr(tomesd_plus, name) for name in tomesd_plus.__all__)
