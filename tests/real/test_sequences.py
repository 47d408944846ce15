"Amazon Beauty, S3-Rec's file: published figures that only the right protocol reproduces."
from pathlib import Path
import pytest
from telemetry_loop.metrics import summarise
from telemetry_loop.train import baseline_ranks, leave_one_out, read_sequences

FILE = Path(__file__).parents[2].parent/'shared/data/s3rec_beauty/Beauty.txt'
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason='Beauty.txt is not in ../shared/data')

@pytest.fixture(scope='module')
def found():
    sequences, items, skipped = read_sequences(FILE)
    assert (len(sequences), len(items), skipped) == (22363, 12101, 0)
    user = leave_one_out(sequences).user
    return {name: {k: e.value for k, e in summarise(r, user).items()} for name, r in baseline_ranks(sequences, len(items)).items()}

@pytest.mark.parametrize('name, recall, ndcg', [('most_popular', .0115, .0055), ('most_popular_with_test', .0152, .0068)])
def test_popularity_is_reproduced_to_four_digits(found, name, recall, ndcg):
    assert (round(found[name]['recall@10'], 4), round(found[name]['ndcg@10'], 4)) == (recall, ndcg)

@pytest.mark.parametrize('name, ndcg, recall', [('gap_markov', .0484, .0783), ('gap_markov_refit', .0579, .0906)])
def test_gap_markov_is_at_least_what_is_known_of_it(found, name, ndcg, recall):
    assert ndcg <= found[name]['ndcg@10'] < 1.15*ndcg and recall <= found[name]['recall@10'] < 1.15*recall
