"""A job with both halves, to be simulated, exported or submitted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.job_config.api import FedJob

from .controller import FedParaController
from .executor import FedParaExecutor


def fedpara_job(
    name: str,
    server: str,
    node: str,
    sites: Sequence[str],
    config: Mapping[str, Any] | None = None,
    *,
    scripts: Sequence[str] = (),
    min_clients: int | None = None,
) -> FedJob:
    """A job for NVIDIA FLARE: ``simulator_run``, ``export_job``, then ``submit_job``.

    Args:
        name: the job's.
        server: ``"module:function"`` that makes the server's setup.
        node: ``"module:function"`` that makes a site's.
        sites: the sites' names; client i is the i-th.
        config: what both functions are given.
        scripts: files or folders with these modules, where the sites do not have them installed.
        min_clients: sites that FLARE wants before it starts the job, and alive during it; all by
            default. Give ``args.quorum`` the same share, or less.
    """
    job = FedJob(name, min_clients=len(sites) if min_clients is None else min_clients)
    job.to_server(FedParaController(server, sites, config))
    for site in sites:
        job.to(FedParaExecutor(node, sites, config), site)
    for script in scripts:
        for target in ("server", *sites):
            job.to(script, target)
    return job
