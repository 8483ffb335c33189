"""The command line: `vertebra` or `python -m vertebra`."""

from __future__ import annotations

try:
    import typer

    from ._cli import drop_in, env, list, parity, predict, report, tune
    from ._cli._app import Commands
    from .bench.cli import bench
except ImportError as error:
    if error.name not in ("rich", "typer"):
        raise
    raise SystemExit(f"{error}; the command line needs: pip install 'vertebra[cli]'") from None

app = typer.Typer(cls=Commands, add_completion=False)


@app.callback(invoke_without_command=True)
def _root(context: typer.Context) -> None:  # pyright: ignore[reportUnusedFunction]
    """Vision backbones in PyTorch, made fast by Triton kernels."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.command()(env.env)
app.command("list")(list.list_models)
app.command()(predict.predict)
app.add_typer(bench, name="bench")
app.command()(tune.tune)
app.command()(parity.parity)
app.command()(drop_in.drop_in)
app.command()(report.report)


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
