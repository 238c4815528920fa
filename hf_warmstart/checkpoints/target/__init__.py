"""The folder to be: staged, journalled, and there when it is whole."""
