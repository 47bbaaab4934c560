"""`serve`: a voice model behind the speech API that existing clients speak, with a page to try it."""
