"""Data, training, search, execution, reports and the command line. The only package that knows Ray or Optuna."""
