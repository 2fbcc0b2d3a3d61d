"""What hooks know of torch functions: the name of a function, method or operator -> its rule for split values.

Names that the compiler's table of families has are read from there.
"""

from __future__ import annotations

from fxsp.hooks import rules, rules_index, rules_mix, rules_shape
from fxsp.hooks.attention import attention
from fxsp.hooks.dispatch import Rule
from fxsp.passes.rules.families import names_of

__all__ = ["TABLE"]

#: Rules that have the name of the function.
_OF_ONE: tuple[Rule, ...] = (
    rules.as_strided, rules.copy, rules.dropout, rules_shape.squeeze, rules_shape.unsqueeze, rules_shape.narrow,
    rules_shape.select, rules_shape.index_select, rules_shape.stack, rules_index.getitem, rules_index.setitem,
    rules_mix.outer, rules_mix.einsum, rules_mix.embedding, rules_mix.one_hot,
)  # fmt: skip
#: Of each other rule the names that are no operators of ATen, or not in its family.
_NAMES: tuple[tuple[Rule, str], ...] = (
    (
        rules.elementwise,
        """
        subtract multiply divide negative absolute arctan2 not_equal less less_equal greater greater_equal
        softsign tanhshrink logsigmoid prelu
        """,
    ),
    (
        rules.same_shape,
        """
        to type type_as float double half bfloat16 int long short char byte bool cpu cuda requires_grad
        zeros_like ones_like empty_like full_like fill zero view_as_real .data .real .imag
        """,
    ),
    (
        rules.description,
        """
        __set__ __repr__ __format__ __hash__ __dir__ dim ndimension stride storage_offset
        is_contiguous is_floating_point is_complex is_signed is_inference is_pinned element_size data_ptr get_device
        untyped_storage retain_grad register_hook register_post_accumulate_grad_hook is_same_size is_set_to result_type
        new_zeros new_ones new_full new_empty new_tensor
        .grad ._base ._grad _is_view _is_zerotensor is_conj is_neg
        """,
    ),
    (rules.sizes, ".shape size numel nelement __len__"),
    (rules.random, "rand_like randn_like randint_like bernoulli"),
    (rules_shape.reshape, "view reshape flatten unflatten ravel view_as reshape_as _unsafe_view"),
    (rules_shape.permute, "permute transpose swapaxes swapdims t movedim moveaxis adjoint .T .H .mT .mH"),
    (rules_shape.expand, "expand expand_as broadcast_to repeat tile"),
    (rules_shape.split, "chunk split split_with_sizes tensor_split unsafe_chunk unsafe_split hsplit vsplit dsplit"),
    (rules_shape.cat, "cat concat concatenate"),
    (rules_mix.matmul, "matmul mm bmm mv dot"),
    (rules_mix.addmm, "addmm baddbmm"),
    (rules_mix.along, " ".join(rules_mix.ALONG)),
    (rules_mix.loss, "cross_entropy nll_loss cosine_similarity"),
    (rules_mix.comparison, "equal allclose"),
    (rules_mix.rows_of_this_rank, "numpy tolist __array__"),
    (attention, "scaled_dot_product_attention"),
)

TABLE: dict[str, Rule] = {
    **dict.fromkeys(names_of("elementwise"), rules.elementwise),
    **dict.fromkeys(names_of("elementwise_loss"), rules_mix.loss),
    **{rule.__name__: rule for rule in _OF_ONE},
    **{name: rule for rule, names in _NAMES for name in names.split()},
}
