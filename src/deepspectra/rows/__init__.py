"""The one idea: gradients, features and errors indexed by example, true and potential class; averages over them."""
