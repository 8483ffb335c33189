"""Measurements: every answer is checked before it is timed, and nothing wrong is timed.

`main_job` is `make bench`, `gpu` is `make gpu`. Both hand `runner.measure` a list of providers, and
get back the rows that `results` keeps as JSON and `report` shows.
"""
