import pickle

from llm.data.sources.files import UnreadableFile
from llm.errors import UserError


def test_one_line_says_where_what_and_what_to_do():
    error = UserError('no file\nmatches', where='data.gin:3', fix='Check\n  the glob.')
    assert str(error) == 'data.gin:3: no file matches. Check the glob.'


def test_parts_that_are_absent_leave_no_trace():
    assert str(UserError('it broke')) == 'it broke'


def test_an_error_comes_whole_out_of_another_process():
    error = UnreadableFile('is full', where='a.txt', fix='Empty it')
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is UnreadableFile and str(again) == str(error) == 'a.txt: is full. Empty it'
