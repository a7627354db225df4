"""What the dashboards share: variables, queries that keep to them, panels of one look, and rows of panels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from grafana_foundation_sdk.builders import common, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.models.common import (
    BigValueColorMode,
    BigValueGraphMode,
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    ScaleDistribution,
    StackingMode,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    Dashboard,
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableOption,
    VariableRefresh,
    VariableSort,
)

RATE = "[$__rate_interval]"
QUANTILES = (0.5, 0.95)
# A process by what its metrics are labelled with: a pod's name where the operator gives it, its address anywhere.
PROCESS = "{{pod}} {{instance}}"
Panels = Sequence[timeseries.Panel | stat.Panel]
_DATASOURCE = DataSourceRef(type_val="prometheus", uid="${datasource}")
_GRID_WIDTH = 24
_HEIGHT = 8


@dataclass
class Question:
    """A row: what an operator asks, and the panels that answer it, all of equal width."""

    text: str
    panels: Panels
    panels_a_line: int = 3


def chosen(metric: str, *matchers: str) -> str:
    """A selector of what `$namespace`, `$job` and `$instance` choose."""
    return _selector(metric, 'namespace=~"$namespace"', 'job=~"$job"', 'instance=~"$instance"', *matchers)


def anywhere(metric: str, *matchers: str) -> str:
    """A selector of all in `$namespace`: of other services than the ones that `$job` lists."""
    return _selector(metric, 'namespace=~"$namespace"', *matchers)


def total_rate(selector: str, *by: str) -> str:
    """Per second."""
    return f"{_sum(by)} (rate({selector}{RATE}))"


def mean(histogram: str, *by: str) -> str:
    """Mean observation. `histogram` is a selector, its metric without `_sum` and `_count`."""
    counts = total_rate(_part(histogram, "_count"), *by)
    # `> 0`: no point where nothing was observed, instead of NaN.
    return f"{total_rate(_part(histogram, '_sum'), *by)} / ({counts} > 0)"


def quantile(phi: float, histogram: str, *by: str) -> str:
    # `>= 0`: no point where nothing was observed, instead of NaN.
    return f"histogram_quantile({phi}, {total_rate(_part(histogram, '_bucket'), 'le', *by)}) >= 0"


def quantiles(histogram: str, legend: str = "") -> list[Dataquery]:
    return [query(quantile(phi, histogram), f"{legend} p{phi * 100:.0f}".strip()) for phi in QUANTILES]


def ratio(part: str, whole: str, *by: str) -> str:
    """Share of one counter's rate in another's; both are selectors."""
    return f"{total_rate(part, *by)} / ({total_rate(whole, *by)} > 0)"


def query(expression: str, legend: str) -> Dataquery:
    return Dataquery().expr(expression).legend_format(legend).datasource(_DATASOURCE).range()


def series(
    title: str,
    unit: str,
    description: str,
    *queries: Dataquery,
    limit: float | None = None,
    maximum: float | None = None,
    stacked: bool = False,
    logarithmic: bool = False,
) -> timeseries.Panel:
    """Lines over time. `limit` is where it becomes bad, drawn as a line; `maximum` fixes the axis."""
    legend = common.VizLegendOptions().display_mode(LegendDisplayMode.LIST).placement(LegendPlacement.BOTTOM)
    tooltip = common.VizTooltipOptions().mode(TooltipDisplayMode.MULTI)
    panel = (
        timeseries.Panel()
        .title(title)
        .unit(unit)
        .description(description)
        .datasource(_DATASOURCE)
        .legend(legend.show_legend(True).calcs([]))
        .tooltip(tooltip)
        .axis_soft_min(0)
        .fill_opacity(25 if stacked else 5)
        .show_points(VisibilityMode.AUTO)
        # Steps may be further apart than scrapes.
        .span_nulls(3_600_000)
    )
    for index, each in enumerate(queries):
        panel.with_target(each.ref_id(ascii_uppercase[index]))
    if stacked:
        panel.stacking(common.StackingConfig().mode(StackingMode.NORMAL))
    if logarithmic:
        panel.scale_distribution(common.ScaleDistributionConfig().type(ScaleDistribution.LOG).log(10))
    if maximum is not None:
        panel.max(maximum)
    if limit is not None:
        panel.thresholds(_thresholds(limit))
        panel.thresholds_style(common.GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED))
    return panel


def figure(title: str, unit: str, description: str, expression: str, *, bad_from: float | None = None) -> stat.Panel:
    """One number, now; red from `bad_from`."""
    return (
        stat.Panel()
        .title(title)
        .unit(unit)
        .description(description)
        .datasource(_DATASOURCE)
        .graph_mode(BigValueGraphMode.AREA)
        .color_mode(BigValueColorMode.VALUE)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
        .thresholds(_thresholds(bad_from))
        .with_target(query(expression, "").ref_id("A"))
    )


def dashboard(
    uid: str, title: str, description: str, questions: Sequence[Question], *, processes: str, label: str
) -> Dashboard:
    """`processes` is a metric of the processes that `$job` and `$instance` list; `label` is what they are called."""
    board = (
        build.Dashboard(f"Cartridge Foundry / {title}")
        .uid(uid)
        .description(description)
        .tags(["cartridge-foundry"])
        .link(_other_dashboards())
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .refresh("30s")
        .time("now-1h", "now")
        .with_variable(build.DatasourceVariable("datasource").label("Data source").type("prometheus"))
        .with_variable(_variable("namespace", "Namespace", "foundry_build_info"))
        .with_variable(_variable("job", f"{label}: job", anywhere(processes)))
        .with_variable(_variable("instance", label, _selector(processes, 'namespace=~"$namespace"', 'job=~"$job"')))
    )
    panel_id = 1
    for question in questions:
        board.with_row(build.Row(question.text).id(panel_id))
        for panel in question.panels:
            panel_id += 1
            board.with_panel(panel.id(panel_id).span(_GRID_WIDTH // question.panels_a_line).height(_HEIGHT))
        panel_id += 1
    return board.build()


def _variable(name: str, label: str, selector: str) -> build.QueryVariable:
    """Values of a label. All is `.*`, which also takes what has no such label: no namespace outside of Kubernetes."""
    return (
        build.QueryVariable(name)
        .label(label)
        .datasource(_DATASOURCE)
        .query({"query": f"label_values({selector}, {name})", "refId": name})
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(VariableSort.ALPHABETICAL_ASC)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def _other_dashboards() -> build.DashboardLink:
    return (
        build.DashboardLink("Cartridge Foundry")
        .type(DashboardLinkType.DASHBOARDS)
        .tags(["cartridge-foundry"])
        .keep_time(True)
    )


def _thresholds(bad_from: float | None) -> build.ThresholdsConfig:
    steps = [Threshold(value=None, color="green")]
    if bad_from is not None:
        steps.append(Threshold(value=bad_from, color="red"))
    return build.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)


def _selector(metric: str, *matchers: str) -> str:
    return f"{metric}{{{','.join(matchers)}}}"


def _part(histogram: str, suffix: str) -> str:
    metric, brace, matchers = histogram.partition("{")
    return metric + suffix + brace + matchers


def _sum(by: Sequence[str]) -> str:
    return f"sum by ({', '.join(by)})" if by else "sum"
