"""What README and documentation show of results and of the registry: generated, never typed.

A page holds a part between two marks,

    <!-- report: NAME -->
    ... what is generated ...
    <!-- end -->

and a chart is a pair of PNGs under `docs/assets`, one for a light page and one for a dark one.
`vertebra report` writes both, from the JSON that is committed under `bench/results` and from the
registry; `vertebra report --check`, and a test, say what no longer agrees. `site` has the list.
"""
