"""
The images in Kubernetes manifests and compose files. Pure.

Every C{image} key counts, wherever it is: in pods, pod templates, C{initContainers}, custom resources. The documents
are parsed to plain YAML nodes, so YAML tags have no effect.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Final

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

# Image names appear in the daemon's log. These AWS variables are not secret, and are part of registry names.
_PUBLIC: Final = frozenset({"AWS_ACCOUNT_ID", "AWS_REGION", "AWS_DEFAULT_REGION"})
_SECRET = re.compile(
    r"AWS_.*|ECR_?PROXY_.*|PROXY_.*|.*_PROXY|DOCKER_AUTH_CONFIG"
    r"|(?:.*_)?(?:SECRET|TOKEN|PASSWORD|PASSWD|PASS|PASSPHRASE|CREDENTIALS?|(?:API|ACCESS|PRIVATE)_?KEY)(?:_.*)?",
    re.IGNORECASE,
)
_VARIABLE = re.compile(r"\$(?:(\$)|([A-Za-z_]\w*)|\{([A-Za-z_]\w*)(?:(:?)-([^{}]*))?\})")


def images_in(text: str, environ: Mapping[str, str]) -> Iterator[str]:
    """
    Yield the images in a file of one or more YAML documents, without duplicates, in order.

    @param environ: for the variables of a compose file.
    @raise ValueError: if the file is not YAML, or a variable is not set.
    """
    try:
        documents = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError) as problem:
        raise ValueError(f"not YAML: {' '.join(str(problem).split())[:200]}") from None
    yield from dict.fromkeys(expanded(name, environ) for each in documents if each is not None for name in _walk(each))


def _walk(root: Node) -> Iterator[str]:
    """
    Find the images below a node. The node of an anchor appears in several places, but is visited once.
    """
    seen, waiting = set(), [root]
    while waiting:
        node = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, SequenceNode):
            waiting += reversed(node.value)
        elif isinstance(node, MappingNode):
            yield from (value.value for key, value in node.value if _names_image(key, value))
            yield from _volumes(node)
            waiting += [value for _, value in reversed(node.value)]


def _names_image(key: Node, value: Node) -> bool:
    return key.value == "image" and isinstance(value, ScalarNode) and bool(value.value.strip())


def _volumes(node: MappingNode) -> Iterator[str]:
    """
    Find the image of an C{image} volume: Kubernetes API, ImageVolumeSource.
    """
    for key, value in node.value:
        if key.value == "image" and isinstance(value, MappingNode):
            yield from (
                inner.value
                for name, inner in value.value
                if name.value == "reference" and isinstance(inner, ScalarNode)
            )


def expanded(text: str, environ: Mapping[str, str]) -> str:
    """
    Substitute the variables of a compose file: compose spec, "Interpolation".

    @raise ValueError: if one is not set, or may hold a secret.
    """

    def value(found: re.Match[str]) -> str:
        dollar, plain, name, colon, default = found.groups()
        if dollar:
            return "$"
        if is_secret(plain or name):
            raise ValueError(f"{text!r}: the variable {plain or name} may hold a secret; write the image's name out")
        given = environ.get(plain or name)
        if given is None or (colon and not given):
            given = default
        if given is None:
            raise ValueError(f"{text!r}: the variable {plain or name} is not set")
        return given

    result = _VARIABLE.sub(value, text)
    if "${" in text and "${" in result:
        raise ValueError(f"{text!r}: unsupported variable syntax")
    return result


def is_secret(variable: str) -> bool:
    """
    Return True for variables of AWS and ours, and for names that suggest a secret.
    """
    return variable.upper() not in _PUBLIC and _SECRET.fullmatch(variable) is not None
