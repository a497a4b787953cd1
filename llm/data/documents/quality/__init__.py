"""Rules of quality: what published data sets keep and remove, as sets of rules that judge a whole batch at once.

`rules` is the stage; a file for each published set beside it. `batch` holds what the sets share (lines, words), so that
a text is split once; `words` interns words, and `english_words` says what a word is.
"""
