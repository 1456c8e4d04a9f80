package kvstore

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
)

const (
	// rootUser is the name that etcd has for the user, and for the role, that may do everything.
	rootUser = "root"
	// ownPrefix is what the cluster's own agents read and write: Prefix and PrivatePrefix are under it.
	ownPrefix = "causeway/"
)

// Access administers who may do what in a store, by etcd's users and roles. A user is the common name of a client's
// certificate. It needs a certificate of the user root. Every user has one role, of the same name, and no password, so nobody can
// be it without a certificate. All methods may be called at the same time, by several processes too, and again after having failed half way.
type Access struct {
	client  *clientv3.Client
	timeout time.Duration
	where   string
}

// OpenAccess connects as root. Unlike Dial it fails if the store does not answer within the request timeout, or denies that we are root. Errors are
// ErrUnavailable and ErrDenied.
func OpenAccess(ctx context.Context, cfg Config) (*Access, error) {
	if err := cfg.complete(); err != nil {
		return nil, err
	}
	client, err := newClient(cfg)
	if err != nil {
		return nil, err
	}
	a := &Access{client: client, timeout: cfg.RequestTimeout, where: strings.Join(cfg.Endpoints, ", ")}
	if err := a.reach(ctx); err != nil {
		return nil, errors.Join(err, a.Close())
	}
	return a, nil
}

// reach asks for something that only root may know. It goes around clientv3, whose requests wait for a connection and then know nothing but that time ran out.
func (a *Access) reach(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	auth := pb.NewAuthClient(a.client.ActiveConnection())
	for {
		_, err := auth.UserList(ctx, &pb.AuthUserListRequest{})
		if err == nil {
			return nil
		}
		if !unavailable(err) || !sleep(ctx, 50*time.Millisecond) {
			return a.explain("administer users", rootUser, err)
		}
	}
}

// Close ends the connection.
func (a *Access) Close() error {
	if err := a.client.Close(); err != nil && !errors.Is(err, context.Canceled) {
		return fmt.Errorf("kvstore: close connection to %s: %w", a.where, err)
	}
	return nil
}

// Prepare makes the users root and agent, agent with the right to read and write what is Causeway's, and has the
// store refuse everybody without a user. It may be done again at any time.
func (a *Access) Prepare(ctx context.Context, agent string) error {
	if err := checkUser(agent); err != nil {
		return err
	}
	var enabled bool
	err := a.do(ctx, "ask for the state of authentication for", agent, nil, func(ctx context.Context) error {
		resp, err := a.client.AuthStatus(ctx)
		enabled = err == nil && resp.Enabled
		return err
	})
	if err != nil {
		return err
	}
	if !enabled {
		// A store that is enabled has them, or we would not have been let in.
		if err := a.addUser(ctx, rootUser); err != nil {
			return err
		}
		if err := a.addRole(ctx, rootUser); err != nil {
			return err
		}
		if err := a.giveRole(ctx, rootUser); err != nil {
			return err
		}
	}
	if err := a.allow(ctx, agent, ownPrefix, authpb.Permission_READWRITE); err != nil {
		return err
	}
	if enabled {
		return nil
	}
	return a.do(ctx, "enable authentication, with the user", agent, nil, func(ctx context.Context) error {
		_, err := a.client.AuthEnable(ctx)
		return err
	})
}

// GrantRead makes a user that may read what is under prefix, and do nothing else. One that exists is made so.
func (a *Access) GrantRead(ctx context.Context, user, prefix string) error {
	if err := checkUser(user); err != nil {
		return err
	}
	if prefix == "" {
		return fmt.Errorf("kvstore: let user %q read: the prefix is empty, which would be everything", user)
	}
	return a.allow(ctx, user, prefix, authpb.Permission_READ)
}

// Revoke removes a user and its role, at once also from watches that it has open on our own server. One that does not exist is no error.
func (a *Access) Revoke(ctx context.Context, user string) error {
	if err := checkUser(user); err != nil {
		return err
	}
	err := a.do(ctx, "remove user", user, rpctypes.ErrUserNotFound, func(ctx context.Context) error {
		_, err := a.client.UserDelete(ctx, user)
		return err
	})
	if err != nil {
		return err
	}
	return a.do(ctx, "remove the role of user", user, rpctypes.ErrRoleNotFound, func(ctx context.Context) error {
		_, err := a.client.RoleDelete(ctx, user)
		return err
	})
}

// Readers lists the users that GrantRead has made, in order: those with a role of their own name that may read and nothing else.
func (a *Access) Readers(ctx context.Context) (readers []string, err error) {
	var users []string
	err = a.do(ctx, "list users as", rootUser, nil, func(ctx context.Context) error {
		resp, err := a.client.UserList(ctx)
		if err == nil {
			users = resp.Users
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	for _, user := range users {
		roles, err := a.roles(ctx, user)
		if err != nil {
			return nil, err
		}
		if len(roles) != 1 || roles[0] != user || user == rootUser {
			continue
		}
		permissions, err := a.permissions(ctx, user)
		if err != nil {
			return nil, err
		}
		writes := func(p *authpb.Permission) bool { return p.PermType != authpb.Permission_READ }
		if len(permissions) > 0 && !slices.ContainsFunc(permissions, writes) {
			readers = append(readers, user)
		}
	}
	slices.Sort(readers)
	return readers, nil
}

// allow makes a user that may do this and nothing else. The role comes first, so that the user never has more, nor has it while it is unfinished.
func (a *Access) allow(ctx context.Context, user, prefix string, kind authpb.Permission_Type) error {
	if err := a.addRole(ctx, user); err != nil {
		return err
	}
	if err := a.setPermission(ctx, user, prefix, kind); err != nil {
		return err
	}
	if err := a.addUser(ctx, user); err != nil {
		return err
	}
	roles, err := a.roles(ctx, user)
	if err != nil {
		return err
	}
	for _, role := range roles {
		if role == user {
			continue
		}
		err := a.do(ctx, "take role "+role+" from user", user, rpctypes.ErrRoleNotGranted, func(ctx context.Context) error {
			_, err := a.client.UserRevokeRole(ctx, user, role)
			return err
		})
		if err != nil {
			return err
		}
	}
	return a.giveRole(ctx, user)
}

// setPermission gives a role one permission, and takes all others from it.
func (a *Access) setPermission(ctx context.Context, role, prefix string, kind authpb.Permission_Type) error {
	end := clientv3.GetPrefixRangeEnd(prefix)
	has, err := a.permissions(ctx, role)
	if err != nil {
		return err
	}
	granted := false
	for _, p := range has {
		if string(p.Key) == prefix && string(p.RangeEnd) == end {
			granted = p.PermType == kind
			continue // granting another kind replaces it
		}
		err := a.do(ctx, "take a permission from role", role, rpctypes.ErrPermissionNotGranted, func(ctx context.Context) error {
			_, err := a.client.RoleRevokePermission(ctx, role, string(p.Key), string(p.RangeEnd))
			return err
		})
		if err != nil {
			return err
		}
	}
	if granted {
		return nil
	}
	return a.do(ctx, "give a permission to role", role, nil, func(ctx context.Context) error {
		_, err := a.client.RoleGrantPermission(ctx, role, prefix, end, clientv3.PermissionType(kind))
		return err
	})
}

// addUser makes a user that only a certificate lets in.
func (a *Access) addUser(ctx context.Context, user string) error {
	return a.do(ctx, "add user", user, rpctypes.ErrUserAlreadyExist, func(ctx context.Context) error {
		_, err := a.client.UserAddWithOptions(ctx, user, "", &clientv3.UserAddOptions{NoPassword: true})
		return err
	})
}

func (a *Access) addRole(ctx context.Context, role string) error {
	return a.do(ctx, "add role", role, rpctypes.ErrRoleAlreadyExist, func(ctx context.Context) error {
		_, err := a.client.RoleAdd(ctx, role)
		return err
	})
}

// giveRole gives a user the role of its own name.
func (a *Access) giveRole(ctx context.Context, user string) error {
	return a.do(ctx, "give its role to user", user, nil, func(ctx context.Context) error {
		_, err := a.client.UserGrantRole(ctx, user, user)
		return err
	})
}

// roles of a user, none if there is no such user.
func (a *Access) roles(ctx context.Context, user string) (roles []string, err error) {
	err = a.do(ctx, "ask for user", user, rpctypes.ErrUserNotFound, func(ctx context.Context) error {
		resp, err := a.client.UserGet(ctx, user)
		if err == nil {
			roles = resp.Roles
		}
		return err
	})
	return roles, err
}

// permissions of a role, none if there is no such role.
func (a *Access) permissions(ctx context.Context, role string) (permissions []*authpb.Permission, err error) {
	err = a.do(ctx, "ask for role", role, rpctypes.ErrRoleNotFound, func(ctx context.Context) error {
		resp, err := a.client.RoleGet(ctx, role)
		if err == nil {
			permissions = resp.Perm
		}
		return err
	})
	return permissions, err
}

// do makes one request. The error fine, if not nil, says that there was nothing to do.
func (a *Access) do(ctx context.Context, what, name string, fine error, request func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, a.timeout)
	defer cancel()
	_, err := withNewestUsers(ctx, func() (struct{}, error) { return struct{}{}, request(ctx) })
	if err == nil || fine != nil && errors.Is(err, fine) {
		return nil
	}
	return a.explain(what, name, err)
}

func (a *Access) explain(what, name string, err error) error {
	where := fmt.Sprintf("kvstore: %s %q at %s", what, name, a.where)
	switch {
	case denied(err):
		return fmt.Errorf("%s: %w: %s: it takes a certificate of the user %s", where, ErrDenied, plainCause(err), rootUser)
	case unavailable(err):
		return fmt.Errorf("%s: %w: %s", where, ErrUnavailable, plainCause(err))
	}
	return fmt.Errorf("%s: %w", where, err)
}

// checkUser refuses names that are not to be given away.
func checkUser(user string) error {
	switch user {
	case "":
		return errors.New("kvstore: a user needs a name: that of its certificate")
	case rootUser:
		return fmt.Errorf("kvstore: the user %s administers the store: choose another name", rootUser)
	}
	return nil
}
