// Package testbed brings up whole clusters on one machine: every node, pod and
// store is a network namespace with a process of its own, every packet and every
// key is real. "clustermesh testbed" drives it by hand, "clustermesh demo" and
// the end-to-end tests through this package.
//
// A [Bed] lives in a directory. All that it makes outside of that directory
// (namespaces in /run/netns, a tree in the cgroup file system) carries the bed's ID
// in its name, so that [Clean] finds it without any record. Nothing is ever put into the machine's own
// network namespace.
//
// The order of locks: the operation lock of a bed (lock.go) before its state
// lock; commands of several processes may work on one bed at once.
package testbed
