"""`flowrl feedback RUN`: a page at which people judge a run's answers, and what they said in other tools' formats."""
