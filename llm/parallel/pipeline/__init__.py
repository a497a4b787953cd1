"""Pipeline parallelism: schedules as tables of ticks, and the one program that runs any of them.

`schedules` orders passes, `granularity` cuts them into pieces, `simulation` and `zero_bubble` say when each runs,
`planning` chooses, `table` and `validation` make and check the table; `split` cuts up a layer's backward pass.

`stages` is what a model brings and `placement` where its parameters live; `executor` runs the table, by `operations` of
one stage each and by what all do together, in `joint` and `outside`.
"""
