import hf_layershuffle
from hf_layershuffle.common import environment


def test_versions_are_known_where_the_package_is_not_installed(monkeypatch):
    """As when it lies on PYTHONPATH: there is no metadata of it then."""
    asked = []
    monkeypatch.setattr(environment.metadata, "version", lambda name: asked.append(name) or "1")
    assert environment.version_of("hf-layershuffle") == hf_layershuffle.__version__
    assert environment.version_of("torch") == "1" and asked == ["torch"]
    assert environment.describe_environment()["versions"]["hf-layershuffle"] == hf_layershuffle.__version__
