"""How a request's pages are shared. A new way is a class here and a line in `recipes.BUDGETS`."""
