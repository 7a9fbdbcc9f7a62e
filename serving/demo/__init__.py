"""The demo page: whose history, two arms' lists beside each other, and what of the history each item was chosen by."""
