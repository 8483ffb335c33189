"""The kernels of a convolution: which of them runs, and in which configuration.

A configuration is written as `gather:128x64x64x1:w4:s3`: the kernel, its blocks in the order of its
`Config`, warps, stages. A kernel alone picks them by arithmetic; without one, the first kernel that
takes the call does.
"""

from typing import Any

from . import _conv_gather, _conv_tiles
from ._conv import Affine, Site, parsed, simplest, written
from ._device import facts


def _kernels() -> dict[str, Any]:
    """Return the modules of the kernels, the first that takes a call being the one it gets."""
    return {"tiles": _conv_tiles, "gather": _conv_gather}


def forward(site: Site, affine: Affine, act: str, precision: str, configuration: str) -> None:
    """Write y."""
    site = simplest(site)
    kernel, config = _read(site, precision, configuration)
    reason = kernel.refuses(site, precision, facts(site.x.device), config)
    if reason is not None:
        raise NotImplementedError(f"conv2d_act cannot run as {configuration}: {reason}")
    kernel.run(site, affine, act, precision, config)


def refuses(site: Site, precision: str, configuration: str) -> str | None:
    """Return why a configuration does not serve a convolution, whose y may be a meta tensor."""
    site = simplest(site)
    try:
        kernel, config = _read(site, precision, configuration)
    except ValueError as error:
        return str(error)
    return kernel.refuses(site, precision, facts(site.x.device), config)


def configurations(site: Site, precision: str) -> list[str]:
    """Return the configurations worth measuring for a convolution, the analytic ones first."""
    site, device = simplest(site), facts(site.x.device)
    found = [
        (index, f"{name}:{written(config)}")
        for name, kernel in _kernels().items()
        for index, config in enumerate(kernel.configs(site, precision, device))
        if kernel.refuses(site, precision, device, config) is None
    ]
    return [text for _, text in sorted(found, key=lambda pair: pair[0] > 0)]


def _read(site: Site, precision: str, configuration: str) -> tuple[Any, Any]:
    """Return the kernel and the configuration that a text names, or that arithmetic picks."""
    device = facts(site.x.device)
    if not configuration:
        for kernel in _kernels().values():
            config = kernel.pick(site, precision, device)
            if kernel.refuses(site, precision, device, config) is None:
                return kernel, config
    name, _, rest = configuration.partition(":")
    kernel = _kernels().get(name)
    if kernel is not None and not rest:
        return kernel, kernel.pick(site, precision, device)
    config = None if kernel is None else parsed(kernel.Config, rest)
    if config is not None:
        return kernel, config
    raise ValueError(
        f"{configuration!r} is no configuration; give {' or '.join(_kernels())}, its "
        "blocks, warps and stages, as in gather:128x64x64x1:w4:s3"
    )
