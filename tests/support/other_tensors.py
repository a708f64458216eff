"""The tensors of each module of other programs, in its order, for `random_model` of each version.

Each is of 2 layers, vocabulary 19, width 24, 3 heads of 8, feed-forward width 64 (Goose: 96), ranks 3 and 5 (Goose: 5,
3, 2 and 4).  A line has name, shape, and the official name if the official tensor is the same.  N is the layer, and *
means weight and then bias.  FLA_7 is what fla 0.6.0 has.
"""

HUGGINGFACE_5 = """
rwkv.embeddings.weight 19x24 emb.weight
rwkv.blocks.0.pre_ln.* 24 blocks.0.ln0.*
rwkv.blocks.N.ln1.* 24 blocks.N.ln1.*
rwkv.blocks.N.ln2.* 24 blocks.N.ln2.*
rwkv.blocks.N.attention.time_decay 3x8 blocks.N.att.time_decay
rwkv.blocks.N.attention.time_faaaa 3x8 blocks.N.att.time_faaaa
rwkv.blocks.N.attention.time_mix_gate 1x1x24 blocks.N.att.time_mix_g
rwkv.blocks.N.attention.time_mix_key 1x1x24 blocks.N.att.time_mix_k
rwkv.blocks.N.attention.time_mix_value 1x1x24 blocks.N.att.time_mix_v
rwkv.blocks.N.attention.time_mix_receptance 1x1x24 blocks.N.att.time_mix_r
rwkv.blocks.N.attention.key.weight 24x24 blocks.N.att.key.weight
rwkv.blocks.N.attention.value.weight 24x24 blocks.N.att.value.weight
rwkv.blocks.N.attention.receptance.weight 24x24 blocks.N.att.receptance.weight
rwkv.blocks.N.attention.gate.weight 24x24 blocks.N.att.gate.weight
rwkv.blocks.N.attention.output.weight 24x24 blocks.N.att.output.weight
rwkv.blocks.N.attention.ln_x.* 24 blocks.N.att.ln_x.*
rwkv.blocks.N.feed_forward.time_mix_key 1x1x24 blocks.N.ffn.time_mix_k
rwkv.blocks.N.feed_forward.time_mix_receptance 1x1x24 blocks.N.ffn.time_mix_r
rwkv.blocks.N.feed_forward.key.weight 64x24 blocks.N.ffn.key.weight
rwkv.blocks.N.feed_forward.receptance.weight 24x24 blocks.N.ffn.receptance.weight
rwkv.blocks.N.feed_forward.value.weight 24x64 blocks.N.ffn.value.weight
rwkv.ln_out.* 24 ln_out.*
head.weight 19x24 head.weight
"""

HUGGINGFACE_6 = """
rwkv.embeddings.weight 19x24 emb.weight
rwkv.blocks.0.pre_ln.* 24 blocks.0.ln0.*
rwkv.blocks.N.ln1.* 24 blocks.N.ln1.*
rwkv.blocks.N.ln2.* 24 blocks.N.ln2.*
rwkv.blocks.N.attention.time_maa_x 1x1x24 blocks.N.att.time_maa_x
rwkv.blocks.N.attention.time_maa_w 1x1x24 blocks.N.att.time_maa_w
rwkv.blocks.N.attention.time_maa_k 1x1x24 blocks.N.att.time_maa_k
rwkv.blocks.N.attention.time_maa_v 1x1x24 blocks.N.att.time_maa_v
rwkv.blocks.N.attention.time_maa_r 1x1x24 blocks.N.att.time_maa_r
rwkv.blocks.N.attention.time_maa_g 1x1x24 blocks.N.att.time_maa_g
rwkv.blocks.N.attention.time_maa_w1 24x15 blocks.N.att.time_maa_w1
rwkv.blocks.N.attention.time_maa_w2 5x3x24 blocks.N.att.time_maa_w2
rwkv.blocks.N.attention.time_decay 1x1x24 blocks.N.att.time_decay
rwkv.blocks.N.attention.time_decay_w1 24x5 blocks.N.att.time_decay_w1
rwkv.blocks.N.attention.time_decay_w2 5x24 blocks.N.att.time_decay_w2
rwkv.blocks.N.attention.time_faaaa 3x8 blocks.N.att.time_faaaa
rwkv.blocks.N.attention.receptance.weight 24x24 blocks.N.att.receptance.weight
rwkv.blocks.N.attention.key.weight 24x24 blocks.N.att.key.weight
rwkv.blocks.N.attention.value.weight 24x24 blocks.N.att.value.weight
rwkv.blocks.N.attention.gate.weight 24x24 blocks.N.att.gate.weight
rwkv.blocks.N.attention.output.weight 24x24 blocks.N.att.output.weight
rwkv.blocks.N.attention.ln_x.* 24 blocks.N.att.ln_x.*
rwkv.blocks.N.feed_forward.time_maa_k 1x1x24 blocks.N.ffn.time_maa_k
rwkv.blocks.N.feed_forward.time_maa_r 1x1x24 blocks.N.ffn.time_maa_r
rwkv.blocks.N.feed_forward.key.weight 64x24 blocks.N.ffn.key.weight
rwkv.blocks.N.feed_forward.receptance.weight 24x24 blocks.N.ffn.receptance.weight
rwkv.blocks.N.feed_forward.value.weight 24x64 blocks.N.ffn.value.weight
rwkv.ln_out.* 24 ln_out.*
head.weight 19x24 head.weight
"""

FLA_6 = """
model.embeddings.weight 19x24 emb.weight
model.layers.0.pre_norm.* 24 blocks.0.ln0.*
model.layers.N.attn_norm.* 24 blocks.N.ln1.*
model.layers.N.attn.x_bias 5x24
model.layers.N.attn.bonus 3x8 blocks.N.att.time_faaaa
model.layers.N.attn.x_proj.0.mu 24
model.layers.N.attn.x_proj.0.linear.weight 15x24
model.layers.N.attn.x_proj.2.weight 24x15
model.layers.N.attn.r_proj.linear.weight 24x24 blocks.N.att.receptance.weight
model.layers.N.attn.w_proj.linear.lora.0.weight 5x24
model.layers.N.attn.w_proj.linear.lora.2.weight 24x5
model.layers.N.attn.w_proj.linear.lora.2.bias 24
model.layers.N.attn.k_proj.linear.weight 24x24 blocks.N.att.key.weight
model.layers.N.attn.v_proj.linear.weight 24x24 blocks.N.att.value.weight
model.layers.N.attn.g_proj.linear.weight 24x24 blocks.N.att.gate.weight
model.layers.N.attn.g_norm.* 24 blocks.N.att.ln_x.*
model.layers.N.attn.o_proj.weight 24x24 blocks.N.att.output.weight
model.layers.N.ffn_norm.* 24 blocks.N.ln2.*
model.layers.N.ffn.key.mu 24
model.layers.N.ffn.key.linear.weight 64x24 blocks.N.ffn.key.weight
model.layers.N.ffn.value.weight 24x64 blocks.N.ffn.value.weight
model.layers.N.ffn.receptance.mu 24
model.layers.N.ffn.receptance.linear.weight 24x24 blocks.N.ffn.receptance.weight
model.norm.* 24 ln_out.*
lm_head.weight 19x24 head.weight
"""

FLA_7 = """
model.embeddings.weight 19x24 emb.weight
model.layers.0.pre_norm.* 24 blocks.0.ln0.*
model.layers.N.attn_norm.* 24 blocks.N.ln1.*
model.layers.N.attn.x_r 1x1x24 blocks.N.att.x_r
model.layers.N.attn.x_w 1x1x24 blocks.N.att.x_w
model.layers.N.attn.x_k 1x1x24 blocks.N.att.x_k
model.layers.N.attn.x_v 1x1x24 blocks.N.att.x_v
model.layers.N.attn.x_a 1x1x24 blocks.N.att.x_a
model.layers.N.attn.x_g 1x1x24 blocks.N.att.x_g
model.layers.N.attn.k_k 24
model.layers.N.attn.k_a 24
model.layers.N.attn.r_k 3x8 blocks.N.att.r_k
model.layers.N.attn.r_proj.weight 24x24 blocks.N.att.receptance.weight
model.layers.N.attn.k_proj.weight 24x24 blocks.N.att.key.weight
model.layers.N.attn.v_proj.weight 24x24 blocks.N.att.value.weight
model.layers.N.attn.o_proj.weight 24x24 blocks.N.att.output.weight
model.layers.N.attn.w_lora.lora.0.weight 5x24
model.layers.N.attn.w_lora.lora.2.weight 24x5
model.layers.N.attn.w_lora.lora.2.bias 24
model.layers.N.attn.v_lora.lora.0.weight 2x24
model.layers.N.attn.v_lora.lora.2.weight 24x2
model.layers.N.attn.v_lora.lora.2.bias 24
model.layers.N.attn.a_lora.lora.0.weight 3x24
model.layers.N.attn.a_lora.lora.2.weight 24x3
model.layers.N.attn.a_lora.lora.2.bias 24
model.layers.N.attn.g_lora.lora.0.weight 4x24
model.layers.N.attn.g_lora.lora.2.weight 24x4
model.layers.N.attn.g_norm.* 24 blocks.N.att.ln_x.*
model.layers.N.ffn_norm.* 24 blocks.N.ln2.*
model.layers.N.ffn.x_k 24
model.layers.N.ffn.key.weight 96x24 blocks.N.ffn.key.weight
model.layers.N.ffn.value.weight 24x96 blocks.N.ffn.value.weight
model.norm.* 24 ln_out.*
lm_head.weight 19x24 head.weight
"""

TABLES = {
    ("huggingface", 5): HUGGINGFACE_5,
    ("huggingface", 6): HUGGINGFACE_6,
    ("fla", 6): FLA_6,
    ("fla", 7): FLA_7,
}
