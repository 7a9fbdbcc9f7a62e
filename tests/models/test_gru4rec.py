"""GRU4Rec against its recurrence written out."""

import pytest
import torch

from longtrail.config import GRU4RecSettings
from longtrail.models.encoders.gru4rec import GRU4Rec
from tests.contracts.batches import SIZES, make_history


@pytest.mark.parametrize("layers", [1, 3])
def test_states_equal_the_recurrence(layers: int) -> None:
    torch.manual_seed(0)
    model = GRU4Rec(GRU4RecSettings(width=6, layers=layers), SIZES).double().eval()
    history = make_history(2, (7, 1, 4))
    with torch.no_grad():
        states_BLD = model.states(history)
        for b, n in enumerate(history.lengths_B.tolist()):
            memory = [torch.zeros(6, dtype=torch.float64) for _ in range(layers)]
            for t in range(n):
                x = model.items.table[history.items_BL[b, t]] * 6**0.5
                for layer in range(layers):
                    weights = [getattr(model.gru, f"{name}_l{layer}") for name in ("weight_ih", "bias_ih", "weight_hh", "bias_hh")]
                    from_input, from_memory = weights[0] @ x + weights[1], weights[2] @ memory[layer] + weights[3]
                    (reset_i, update_i, new_i), (reset_m, update_m, new_m) = from_input.view(3, 6), from_memory.view(3, 6)
                    reset, update = torch.sigmoid(reset_i + reset_m), torch.sigmoid(update_i + update_m)
                    memory[layer] = (1 - update) * torch.tanh(new_i + reset * new_m) + update * memory[layer]
                    x = memory[layer]
                torch.testing.assert_close(states_BLD[b, t], model.output.weight @ x + model.output.bias, rtol=0, atol=1e-12)


def test_it_reads_the_whole_history_given() -> None:
    """Longer than the windows it was trained on, and still the oldest event matters."""
    torch.manual_seed(0)
    model = GRU4Rec(GRU4RecSettings(width=6, max_history=5), SIZES).double().eval()
    history = make_history(2, (30,))
    with torch.no_grad():
        before = model.user_vectors(history)
        history.items_BL[0, 0] = history.items_BL[0, 0] % SIZES.items + 1
        assert (model.user_vectors(history) - before).abs().max() > 0
