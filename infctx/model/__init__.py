"""The model: RWKV-5 (Eagle), RWKV-6 (Finch) and RWKV-7 (Goose), state in and state out at every level.

Letters used for dimensions in this package:

    B  batch: lanes             H  heads, H = D / N
    T  time: tokens             N  head size: key and value channels of a head
    D  width                    F  width of the channel mix
    L  layers                   V  vocabulary

Reading order: rwkv -> block -> time_mix, delta_time_mix, channel_mix -> loss; the recurrence itself is
in infctx/recurrence, its op in infctx/ops.
"""
