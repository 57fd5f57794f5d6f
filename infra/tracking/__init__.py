"""What people see of a run: its progress, its machine, its metrics in MLflow and Ray's endpoint.

In go events of stages and trainers, which never wait for it; out go MLflow runs, the terminal's table and gauges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from infra.lazy import exports

if TYPE_CHECKING:
    from infra.tracking.board import StageExtent, success_rate
    from infra.tracking.mlflow import open_client
    from infra.tracking.monitor import Monitor
    from infra.tracking.provenance import GIT_VARIABLE, git_tags, installed_packages, machine_tags, user_name
    from infra.tracking.system import SystemMetrics
    from infra.tracking.tracker import DataSet
    from infra.tracking.uri import check_server, database_folder, default_uri
else:
    __getattr__ = exports(__name__)
