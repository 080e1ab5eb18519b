set pagination off
set breakpoint pending on
break os_getppid_impl
break getppid
run
bt 3
info breakpoints
