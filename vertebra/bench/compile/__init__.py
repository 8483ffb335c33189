"""`vertebra bench compile`: the fair comparison with torch.compile.

Six providers of one answer, eager and compiled: the peer's model, ours, and the peer's on our ops.
Four questions about each:

* `graphs`: does it compile in one piece, and what is left of our ops in the graph?
* `starts`: how long is the first answer in coming, in a fresh process with empty caches?
* `steady`: how fast is it then, and in how much memory?
* `shapes`: what happens when batches and images change their size?

`subjects` says what is compared, networks and blocks of them; `process` measures what needs a
process of its own, in which `child` runs; `verdicts` says who wins.
"""
